"""Model folders in and out: the only place that knows the names of foreign weights.

folder.py     open a folder in any layout, read a model from it, write one
layout.py     what a layout is
ours.py       our own layout
official.py   InternVL's layouts of released code: base model and Flash
native.py     InternVL's layout of transformers
internvl.py   what the three of InternVL have in common
pieces.py     the list by which a layout's tensors make up ours, in both directions
tensors.py    safetensors files, whole or in shards
export.py     one layout to another, tensor by tensor
hub.py        folders that live on the Hugging Face Hub
"""
