"""Tiny pipelines of the model families in the folder layout of the real ones, one file per family: random weights,
seeded, and tokenizers of the embedded pipeline. SD3's is the embedded pipeline itself.

A module here holds one `TinyFamily`, or several, in FAMILIES; tests take what they need of a family from its record.
"""

from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch

from tiny_families.record import TinyFamily

_MODULES = [import_module(f"{__name__}.{one.name}") for one in iter_modules(__path__)]
FAMILIES: dict[str, TinyFamily] = {one.name: one for module in _MODULES for one in getattr(module, "FAMILIES", ())}
MODELS = {name: family.model for name, family in FAMILIES.items()}
# parameters: every family; variants in `make test-long` alone
NAMES = [pytest.param(n, marks=pytest.mark.long if family.variant else ()) for n, family in FAMILIES.items()]


def write_pipeline(name, folder):
    """Saves the tiny pipeline `name` of FAMILIES into `folder`."""
    torch.manual_seed(0)
    FAMILIES[name].build().save_pretrained(folder)
    return folder


def sampled(*ordinary, names=("sd3", *FAMILIES)):
    """Parameters `names`; those that are not `ordinary` (default: the swept ones) run in `make test-long` alone."""
    ordinary = ordinary or ("sd3", *(name for name, family in FAMILIES.items() if family.swept))
    return [name if name in ordinary else pytest.param(name, marks=pytest.mark.long) for name in names]


def crossed(cases, sample, variants=False):
    """Parameters (name, *case) of every family with every case, a tuple each; of a family that is not swept, those
    outside of `sample` run in `make test-long` alone, of a variant all, unless the sample is for `variants` too.
    """

    def ordinary(family, case):
        return family.swept or (case in sample and (variants or not family.variant))

    return [
        pytest.param(name, *case, marks=() if ordinary(family, case) else pytest.mark.long)
        for name, family in FAMILIES.items()
        for case in cases
    ]
