"""Model folders in and out: the only place that knows the names of foreign weights.

folder.py     open a folder in any layout, read a model from it, write one
layout.py     what a layout is; ours.py, official.py (InternVL, Flash) and native.py (transformers) are theirs
pieces.py     the list by which a layout's tensors make up ours, in both directions
tensors.py    safetensors files, whole or in shards
export.py     one layout to another, tensor by tensor
hub.py        folders that live on the Hugging Face Hub
"""
