"""The types that a model's file may have, by llama.cpp's names, lower case.

Apart from the recipe's other words, which need pydantic: a command on files only starts without it.
"""

from __future__ import annotations

from typing import Literal, get_args

QuantName = Literal[
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_0",
    "q4_1",
    "q4_k_s",
    "q4_k_m",
    "q5_0",
    "q5_1",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "q8_0",
    "iq4_xs",
    "iq3_m",
    "iq3_s",
    "iq3_xxs",
    "iq2_m",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
    "f16",
    "bf16",
    "f32",
]
QUANTS: tuple[str, ...] = get_args(QuantName)
NEED_IMATRIX = ("iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs")
"""Types that llama.cpp does not make without an importance matrix."""
BUDGETED = (
    "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q4_k_m", "q4_k_s", "iq4_xs", "q3_k_l", "q3_k_m", "iq3_m", "iq3_s",
    "q3_k_s", "iq3_xxs", "q2_k", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs",
)  # fmt: skip
"""What a budget chooses from, the largest first.

Without q4_0, q4_1, q5_0 and q5_1: they lose more than K types of their size, and where a row does not hold a
block of those, llama.cpp takes types like them by itself.
"""
