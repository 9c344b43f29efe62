"""Looking into attention: taps, and what can be read from them.

A reader is a file of its own: a function that opens a tap (or runs the model with something
hidden) and gives back a record of arrays. The files:

- `tap.py`: where attention is read and edited; `taps/`: how, a file per kind of model
- `reductions.py`: weights summed up while the model runs
- `maps.py`, `entropy.py`, `sinks.py`, `contrast.py`: what weights say by themselves
- `importance.py`, `curves.py`, over `pruning.py` and `layers.py`: what taking heads out does
- `strength.py`, `patterns.py`, `templates.py`: attention on the grid of an image
- `cross_attention.py`, `speech.py`, `forced.py`: encoder-decoder models
- `occlusion.py`, `occlusion_masks.py`, `gradients.py`, `agreement.py`, `deletion.py`: saliency,
  and whether attention agrees with it
- `records.py`, `inputs.py`: what results and arguments share
"""
