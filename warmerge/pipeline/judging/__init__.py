"""Who is better: policies and their answers, and a judge's verdicts on pairs of them, kept as they come.

contenders   policies as users name them, and one answer of each to every prompt
template     what a language model is asked, and what its reply says
llm          the language model behind an address
verdicts     questions, answered in parallel and kept; the same question is not asked again
matches      answers to the same prompts, and what a judge makes of each two
doubts       what a judge may have in common with what it judges
"""
