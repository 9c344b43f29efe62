"""FreeSwim: videos larger than those a model was trained on, without training.

- `dual_path.py`: self-attention in windows, composed by full attention
- `upscale.py`: the whole way from a small video to a large one
"""

from regard.ops.window import entropy_scale
from regard.steer.freeswim.dual_path import DualPath, Layer
from regard.steer.freeswim.upscale import flow_sigmas, resize, upscale

__all__ = ["DualPath", "Layer", "entropy_scale", "flow_sigmas", "resize", "upscale"]
