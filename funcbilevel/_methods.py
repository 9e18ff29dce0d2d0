"""The table of methods, made of their docstrings."""

import inspect
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from funcbilevel._estimators.aid import aid
from funcbilevel._estimators.alternating import alternating
from funcbilevel._estimators.darts import darts
from funcbilevel._estimators.evolution_strategy import evolution_strategy
from funcbilevel._estimators.funcid import funcid
from funcbilevel._estimators.gradient_penalty import gradient_penalty
from funcbilevel._estimators.itd import itd
from funcbilevel._estimators.prox_aid import prox_aid
from funcbilevel._estimators.pzobo import pzobo
from funcbilevel._estimators.value_penalty import value_penalty
from funcbilevel._stochastic.amigo import amigo
from funcbilevel._stochastic.bome import bome
from funcbilevel._stochastic.bsa import bsa
from funcbilevel._stochastic.f2sa import f2sa
from funcbilevel._stochastic.f3sa import f3sa
from funcbilevel._stochastic.fsla import fsla
from funcbilevel._stochastic.gaffa import gaffa
from funcbilevel._stochastic.ma_soba import ma_soba
from funcbilevel._stochastic.meha import meha
from funcbilevel._stochastic.mrbo import mrbo
from funcbilevel._stochastic.pbgd import pbgd
from funcbilevel._stochastic.pbgd_free import pbgd_free
from funcbilevel._stochastic.saba import saba
from funcbilevel._stochastic.soba import soba
from funcbilevel._stochastic.srba import srba
from funcbilevel._stochastic.stocbio import stocbio
from funcbilevel._stochastic.sustain import sustain
from funcbilevel._stochastic.ttsa import ttsa
from funcbilevel._stochastic.vrbo import vrbo

ESTIMATORS: tuple[Callable[..., Any], ...] = (
    *(funcid, aid, prox_aid, itd, alternating, value_penalty, gradient_penalty, darts, pzobo, evolution_strategy),
)
SOLVERS: tuple[Callable[..., Any], ...] = (
    *(soba, ma_soba, saba, srba, fsla, sustain, mrbo, vrbo, ttsa, bsa, stocbio, amigo),
    *(f2sa, f3sa, pbgd, pbgd_free, bome, meha, gaffa),
)


class Method(NamedTuple):
    """What the table says of a method.

    Attributes:
        name: of the function.
        kind: "estimator", for `fb.bilevel`, or "solver".
        order: of the derivatives that it takes: "second", "first" or "zeroth".
        draws: the samples of one outer step, of a solver; empty for an estimator, which sees those of `fb.bilevel`.
        memory: what it keeps beside omega and theta.
        reference: address of the paper.
    """

    name: str
    kind: str
    order: str
    draws: str
    memory: str
    reference: str


class MethodTable(NamedTuple):
    """All methods; `str` of it is a table, in Markdown.

    Attributes:
        rows: one `Method` each.
    """

    rows: tuple[Method, ...]

    def __str__(self) -> str:
        lines = ["| method | kind | order | draws per outer step | memory | paper |", "|---|---|---|---|---|---|"]
        for row in self.rows:
            paper = row.reference.removeprefix("https://").removeprefix("arxiv.org/abs/")
            lines.append(
                f"| `{row.name}` | {row.kind} | {row.order} | {row.draws or 'those of `bilevel`'} | {row.memory} | "
                f"[{paper}]({row.reference}) |"
            )
        return "\n".join(lines)


def methods() -> MethodTable:
    """All estimators and solvers, with the order of their derivatives, what they draw and what they keep.

    Made of the docstrings, each of which says `Order: ... Draws per step: ... Memory: ...`.

    Returns:
        A `MethodTable`.

    Example:
        >>> table = fb.methods()
        >>> [row.name for row in table.rows if row.order == "first" and row.kind == "solver"]
        ['f2sa', 'f3sa', 'pbgd', 'pbgd_free', 'bome', 'meha', 'gaffa']
        >>> print(table)  # doctest: +SKIP
    """
    kinds = (("estimator", ESTIMATORS), ("solver", SOLVERS))
    return MethodTable(tuple(_row(kind, function) for kind, functions in kinds for function in functions))


def _row(kind: str, function: Callable[..., Any]) -> Method:
    text = inspect.getdoc(function) or ""
    paragraph = next((p for p in text.split("\n\n") if p.startswith("Order: ")), "")
    words = " ".join(paragraph.split())
    found = re.fullmatch(r"Order: (\w+)\b.*?(?:Draws per step: (.*?)\. )?Memory: (.*?)\.(?: .*)?", words)
    reference = re.search(r"https://arxiv\.org/abs/[\d.]+\d", text)
    if found is None or reference is None:
        raise ValueError(f"methods: the docstring of {function.__name__} does not say its order, memory and paper.")
    order, draws, memory = found.groups(default="")
    return Method(function.__name__, kind, order, draws, memory, reference.group())
