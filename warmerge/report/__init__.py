"""Rows -> figures and texts for people. The only package that imports matplotlib, and only when it draws.

results   files of a run, and their figures
rows      what the figures read out of rows; names that fit and stay distinct
canvas    how every figure looks, and how it is saved: the same bytes each time
figures   of eval and lmc-curve; learning, best_of_n, optimisation (and its words), win_rates, theory: the others
card/     the README.md of a reward model: its numbers, pictures and words
claims/   what results say of the paper's claims
page/     one page of HTML for many results: its tables, words, figures and looks
"""

from warmerge.report.best_of_n import best_of_n_figure
from warmerge.report.card import model_card
from warmerge.report.figures import eval_figure, heat_map, lmc_figure, sparkline, vs_m_figure
from warmerge.report.learning import learning_figure
from warmerge.report.optimisation import optimisation_figure
from warmerge.report.win_rates import win_rate_figure

__all__ = [
    "best_of_n_figure",
    "eval_figure",
    "heat_map",
    "learning_figure",
    "lmc_figure",
    "model_card",
    "optimisation_figure",
    "sparkline",
    "vs_m_figure",
    "win_rate_figure",
]
