"""Model folders in and out: the only place that knows how other projects store their models.

A family is one module that ends in a `Family`, and one line in the table below.

base.py       what a family is, safetensors files, and our own layout
official.py   released InternVL checkpoints: base model and Flash
native.py     InternVL as transformers stores it
folder.py     open a folder of any family, load a model, save one, write another layout
hub.py        folders on the Hugging Face Hub
"""

from vico_pl.model.families.base import OURS, Family
from vico_pl.model.families.native import HF
from vico_pl.model.families.official import FLASH, INTERNVL

FAMILIES: tuple[Family, ...] = (OURS, FLASH, INTERNVL, HF)
