"""Proxies as users type them: what is meant by NAME=CKPT,CKPT,agg=..., and what is refused before a model is opened."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from warmerge.errors import UsageError
from warmerge.pipeline.proxies import Proxy, parse_proxies


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in: nothing that is typed exists unless a test makes it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def usage(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(text)}$"):
        call()


def rm(*specs: str) -> list[tuple[str, str]]:
    """Name and checkpoint of each."""
    found = parse_proxies(specs)
    assert all(proxy.kind == "rm" and len(proxy.checkpoints) == 1 for proxy in found)
    return [(proxy.name, proxy.checkpoints[0]) for proxy in found]


def ensemble(spec: str, *rms: str) -> Proxy:
    return parse_proxies(rms, [spec])[-1]


# --- names and paths --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "name", "checkpoint"),
    [
        ("a=runs/1", "a", "runs/1"),
        ("runs/1", "1", "runs/1"),
        ("runs/1/", "1", "runs/1/"),
        ("one", "one", "one"),
        ("org/model", "model", "org/model"),
        ("org/model@main", "model@main", "org/model@main"),
        ("a=org/model@v1", "a", "org/model@v1"),
        ("hf://org/model", "model", "hf://org/model"),
        ("/runs/1", "1", "/runs/1"),
        ("a= runs/1", "a", " runs/1"),
        # An = further inside is the path's.
        ("runs/lr=1e-5/1", "1", "runs/lr=1e-5/1"),
        ("runs/lr=1e-5", "lr=1e-5", "runs/lr=1e-5"),
        ("./lr=1e-5", "lr=1e-5", "./lr=1e-5"),
        ("a=runs/lr=1e-5", "a", "runs/lr=1e-5"),
        ("a=b=c", "a", "b=c"),
        # Commas and what looks like an option mean nothing to a single model.
        ("a=runs/x,y", "a", "runs/x,y"),
        ("runs/x,y", "x,y", "runs/x,y"),
        ("a=agg=min", "a", "agg=min"),
    ],
)
def test_a_reward_model_has_the_name_given_or_that_of_its_folder(spec: str, name: str, checkpoint: str) -> None:
    (found,) = parse_proxies([spec])
    assert found == Proxy(name, "rm", (checkpoint,))
    assert (found.aggregate, found.k, found.standardize) == ("mean", 0.5, False)


def test_a_folder_that_exists_is_a_folder_whatever_is_in_its_name(here: Path) -> None:
    assert rm("lr=1") == [("lr", "1")]
    (here / "lr=1").mkdir()
    (here / "1").mkdir()
    assert rm("lr=1") == [("lr=1", "lr=1")]
    assert ensemble("lr=1,1").checkpoints == ("lr=1", "1")
    assert ensemble("a=lr=1,1").checkpoints == ("lr=1", "1")
    assert ensemble("1,lr=1,agg=min").checkpoints == ("1", "lr=1")
    assert parse_proxies([], [], ["lr=1,1"])[0] == Proxy("warm", "warm", ("lr=1", "1"))


def test_rms_come_first_then_ensembles_then_averages_in_the_order_given() -> None:
    found = parse_proxies(["b=2", "a=1"], ["y=a,b", "x=b,a"], ["w=a,b", "a,3"])
    assert [(proxy.name, proxy.kind, proxy.checkpoints) for proxy in found] == [
        ("b", "rm", ("2",)),
        ("a", "rm", ("1",)),
        ("y", "ensemble", ("1", "2")),
        ("x", "ensemble", ("2", "1")),
        ("w", "warm", ("1", "2")),
        ("warm", "warm", ("1", "3")),
    ]


@pytest.mark.parametrize("spec", ["=x", "a=", "=", ""])
def test_half_a_name_is_refused(spec: str) -> None:
    """An empty one too, as of a shell variable that is not set: the path "" would be the folder one is in."""
    text = f"{spec!r}: expected NAME=CKPT, or CKPT"
    usage(lambda: parse_proxies([spec]), text)
    usage(lambda: parse_proxies([], [spec]), text)
    usage(lambda: parse_proxies([], [], [spec]), text)


def test_without_any_proxy_it_is_said_how_to_name_one() -> None:
    usage(lambda: parse_proxies([]), "no proxy is given: name reward models with --rm, --ensemble or --warm")


# --- ensembles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "aggregate", "k", "standardize"),
    [
        ("", "mean", 0.5, False),
        (",agg=mean", "mean", 0.5, False),
        (",agg=median", "median", 0.5, False),
        # Those that compare members with each other do so on one scale, unless told otherwise.
        (",agg=min", "min", 0.5, True),
        (",agg=uwo", "uwo", 0.5, True),
        (",agg=min,scale=raw", "min", 0.5, False),
        (",scale=raw,agg=uwo", "uwo", 0.5, False),
        (",scale=std", "mean", 0.5, True),
        (",agg=median,scale=std", "median", 0.5, True),
        (",agg=uwo,k=0", "uwo", 0.0, True),
        (",k=1e-2,agg=uwo", "uwo", 0.01, True),
        (",k=2,scale=raw,agg=uwo", "uwo", 2.0, False),
    ],
)
def test_options_say_how_members_are_combined(options: str, aggregate: str, k: float, standardize: bool) -> None:
    named, unnamed = ensemble(f"e=1,2{options}"), ensemble(f"1,2{options}")
    assert named == Proxy("e", "ensemble", ("1", "2"), aggregate, k, standardize)
    assert unnamed == Proxy(f"ensemble ({aggregate})", "ensemble", ("1", "2"), aggregate, k, standardize)


def test_options_may_stand_between_checkpoints_and_empty_parts_say_nothing() -> None:
    assert ensemble("e=1,agg=min,2") == ensemble("e=agg=min,1,,2,") == ensemble("e=1,2,agg=min")


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("1,2,agg=max", "--ensemble ensemble (max): expected agg=mean, min, uwo, median, found 'max'"),
        ("e=1,2,agg=", "--ensemble e: expected agg=mean, min, uwo, median, found ''"),
        ("e=1,2,agg=MIN", "--ensemble e: expected agg=mean, min, uwo, median, found 'MIN'"),
        ("e=1,2,scale=", "--ensemble e=1,2,scale=: expected scale=raw or scale=std, found ''"),
        ("1,2,scale=yes", "--ensemble 1,2,scale=yes: expected scale=raw or scale=std, found 'yes'"),
        ("1,2,k=1", "--ensemble 1,2,k=1: k goes with agg=uwo"),
        ("1,2,agg=min,k=1", "--ensemble 1,2,agg=min,k=1: k goes with agg=uwo"),
        ("1,2,agg=uwo,k=", "--ensemble 1,2,agg=uwo,k=: expected k=NUMBER, found ''"),
        ("1,2,agg=uwo,k=half", "--ensemble 1,2,agg=uwo,k=half: expected k=NUMBER, found 'half'"),
        ("e=1,2,agg=uwo,k=-1", "--ensemble e: expected k of 0 or more, found -1"),
        ("e=1,2,agg=uwo,k=nan", "--ensemble e: expected k of 0 or more, found nan"),
        ("e=1,2,agg=uwo,k=inf", "--ensemble e: expected k of 0 or more, found inf"),
        # The last one would win, and nobody would know.
        ("1,2,agg=min,agg=mean", "--ensemble 1,2,agg=min,agg=mean: agg is given twice; give it once"),
        ("1,2,agg=uwo,k=1,k=1", "--ensemble 1,2,agg=uwo,k=1,k=1: k is given twice; give it once"),
        ("1,2,how=min", "--ensemble 1,2,how=min: 'how=min' is neither a path nor an option (agg=, k=, scale=)"),
        ("1,2, agg=min", "--ensemble 1,2, agg=min: ' agg=min' is neither a path nor an option (agg=, k=, scale=)"),
        # Not an ensemble named "agg" with a member "min".
        (
            "agg=min,1,2",
            "--ensemble agg=min,1,2: agg= goes after the checkpoints, and is no name; expected NAME=CKPT,CKPT",
        ),
        ("k=1,2", "--ensemble k=1,2: k= goes after the checkpoints, and is no name; expected NAME=CKPT,CKPT"),
        ("e=1", "--ensemble e: expected two checkpoints or more, found '1' alone"),
        ("1,agg=min", "--ensemble ensemble (min): expected two checkpoints or more, found '1' alone"),
        ("e=agg=min", "--ensemble e=agg=min: expected NAME=CKPT,CKPT"),
        (",", "--ensemble ,: expected NAME=CKPT,CKPT"),
        ("e=1,2,1", "--ensemble e: 1 is given twice; give each checkpoint once"),
        ("e=a,runs/1", "--ensemble e: runs/1 is given twice; give each checkpoint once"),
    ],
)
def test_what_cannot_be_meant_is_refused(spec: str, text: str) -> None:
    usage(lambda: parse_proxies(["a=runs/1"], [spec]), text)


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("1,2,agg=mean", "--warm 1,2,agg=mean: agg=mean goes with --ensemble; an average has no such option"),
        ("w=1,2,k=1", "--warm w=1,2,k=1: k=1 goes with --ensemble; an average has no such option"),
        ("1,2,lambda=2", "--warm 1,2,lambda=2: 'lambda=2' is neither a path nor an option (agg=, k=, scale=)"),
        (
            "scale=std,1,2",
            "--warm scale=std,1,2: scale= goes after the checkpoints, and is no name; expected NAME=CKPT,CKPT",
        ),
        ("1", "--warm warm: expected two checkpoints or more, found '1' alone"),
        ("w=2,2", "--warm w: 2 is given twice; give each checkpoint once"),
    ],
)
def test_an_average_has_no_options_and_two_members_at_least(spec: str, text: str) -> None:
    usage(lambda: parse_proxies([], [], [spec]), text)


def test_one_model_in_two_spellings_is_not_two_members(here: Path) -> None:
    (here / "runs" / "1").mkdir(parents=True)
    (here / "link").symlink_to(here / "runs" / "1")
    for other in ("runs/1/", "./runs/1", str(here / "runs" / "1"), "link", "runs/../runs/1"):
        text = "runs/1 is given twice; give each checkpoint once"
        usage(lambda other=other: ensemble(f"e=runs/1,{other}"), f"--ensemble e: {text}")
        usage(lambda other=other: parse_proxies([], [], [f"w=runs/1,{other}"]), f"--warm w: {text}")
    assert len(ensemble("e=runs/1,runs/2").checkpoints) == 2


def test_a_folder_called_as_an_option_is_a_folder(here: Path) -> None:
    (here / "agg=min").mkdir()
    assert ensemble("1,2,agg=min") == Proxy("ensemble (mean)", "ensemble", ("1", "2", "agg=min"))
    assert ensemble("agg=min,2") == Proxy("ensemble (mean)", "ensemble", ("agg=min", "2"))
    assert ensemble("1,2,agg=median").aggregate == "median"


def test_very_many_members_are_no_file_name_that_is_too_long() -> None:
    members = ",".join(f"/runs/{'x' * 200}/{i}" for i in range(60))
    assert len(ensemble(f"e={members},agg=min").checkpoints) == 60
    assert rm("e=" + "x" * 5000) == [("e", "x" * 5000)]


# --- names of rms as members ------------------------------------------------------------------------------------------


def test_members_may_be_called_by_the_name_of_an_rm() -> None:
    rms = ("a=runs/1", "runs/2", "h=org/model@v1", "runs/lr=1")
    assert ensemble("e=a,2,h,lr=1,runs/3", *rms).checkpoints == (
        "runs/1", "runs/2", "org/model@v1", "runs/lr=1", "runs/3",
    )  # fmt: skip
    # One step only: "b" is the checkpoint of a, and the name of another.
    assert ensemble("e=a,b", "a=b", "b=c").checkpoints == ("b", "c")


def test_the_names_of_ensembles_are_no_checkpoints() -> None:
    found = parse_proxies([], ["e=1,2", "f=e,3"])
    assert found[1].checkpoints == ("e", "3")


def test_a_name_that_is_also_another_folder_is_ambiguous(here: Path) -> None:
    (here / "a").mkdir()
    (here / "runs" / "a").mkdir(parents=True)
    # The checkpoint of the rm may be here, or on the Hub.
    for checkpoint in ("runs/a", "org/model"):
        text = f"'a' is both the name of --rm {checkpoint} and a path; rename the rm"
        usage(lambda checkpoint=checkpoint: ensemble("e=a,2", f"a={checkpoint}"), text)
    usage(lambda: ensemble("e=a,2", "runs/a"), "'a' is both the name of --rm runs/a and a path; rename the rm")
    # The same folder by both is not.
    assert ensemble("e=a,2", "a=./a").checkpoints == ("./a", "2")
    assert ensemble("e=a,2", "a").checkpoints == ("a", "2")
    assert ensemble("e=a,2", f"a={here / 'runs' / os.pardir / 'a'}").checkpoints[1] == "2"
    assert ensemble("e=./a,2", "a=runs/a").checkpoints == ("./a", "2")


# --- names that mean something ----------------------------------------------------------------------------------------


def test_two_proxies_of_one_name_are_refused() -> None:
    text = "two proxies are named {!r}; name one of them, as in --rm other=CKPT"
    usage(lambda: parse_proxies(["a/final", "b/final"]), text.format("final"))
    usage(lambda: parse_proxies(["x=1"], ["x=1,2"]), text.format("x"))
    usage(lambda: parse_proxies([], ["x=1,2"], ["x=1,2"]), text.format("x"))
    usage(lambda: parse_proxies([], ["1,2,agg=uwo", "1,2,agg=uwo,k=1"]), text.format("ensemble (uwo)"))
    usage(lambda: parse_proxies([], [], ["1,2", "1,3"]), text.format("warm"))
    # One model under two names is its user's business.
    assert rm("a=1", "b=1") == [("a", "1"), ("b", "1")]


@pytest.mark.parametrize("name", ["length", "random", "oracle", "gold", "control"])
def test_the_names_of_baselines_and_targets_are_taken(name: str) -> None:
    what = f"the name '{name}' is taken (length, random, oracle, gold, control); choose another"
    usage(lambda: parse_proxies([f"{name}=1"]), f"--rm {name}: {what}")
    usage(lambda: parse_proxies([f"runs/{name}"]), f"--rm {name}: {what}")
    usage(lambda: parse_proxies([], [f"{name}=1,2"]), f"--ensemble {name}: {what}")
    usage(lambda: parse_proxies([], [], [f"{name}=1,2"]), f"--warm {name}: {what}")
    assert rm(f"{name}-rm=1") == [(f"{name}-rm", "1")]


# --- Proxy by itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (("a", "rm", ()), "--rm a: expected one checkpoint, found 0; several are an --ensemble or --warm"),
        (("a", "rm", ("1", "2")), "--rm a: expected one checkpoint, found 2; several are an --ensemble or --warm"),
        (("a", "ensemble", ()), "--ensemble a: expected two checkpoints or more, found none"),
        (("a", "warm", ("1",)), "--warm a: expected two checkpoints or more, found '1' alone"),
        (("a", "baseline", ("1",)), "a: expected a proxy of kind rm, ensemble or warm, found 'baseline'"),
        (("a", "ensemble", ("1", "2"), "max"), "--ensemble a: expected agg=mean, min, uwo, median, found 'max'"),
        (("a", "ensemble", ("1", "2"), "uwo", -0.1), "--ensemble a: expected k of 0 or more, found -0.1"),
        (
            ("a\x1b[31m", "rm", ()),
            "--rm 'a\\x1b[31m': expected one checkpoint, found 0; several are an --ensemble or --warm",
        ),
    ],
)
def test_a_proxy_that_cannot_be_is_refused_also_from_python(values: Any, text: str) -> None:
    usage(lambda: Proxy(*values), text)
