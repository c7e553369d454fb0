"""Feature maps of each stage instead of logits, for detection, segmentation and other heads.

Like timm's `features_only` and `feature_info` (https://huggingface.co/docs/timm/feature_extraction): the output of each
stage's last block, highest resolution first. DenseNets and pre-activation networks return the maps before the norm and
ReLU that follow. The variables are those of the whole network including its head, so any weights of it can be used.
"""

import dataclasses
import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

_STAGE = re.compile(r"stage\d+|inception\d|block\d+")  # prefix of the module names of a stage
_SIZE = 256  # image size in pixels; divisible by the stride of every network here


@dataclasses.dataclass(frozen=True)
class StageInfo:
    """Describes the map of a stage.

    Attributes:
        name: name of the module that outputs it, as in the parameters: "stage2_block4".
        channels: number of channels of the map.
        stride: downsampling factor from the image to the map.
    """

    name: str
    channels: int
    stride: int


class StageMaps(nn.Module):
    """Returns the maps of a network's stages: `[B, H, W, C]` -> a tuple of `[B, H / stride, W / stride, channels]`.

    Attributes:
        network: the whole network; its variables are used as they are. Under `jax.jit` the layers after the last map
            cost nothing.

    Examples:
        >>> from hga_flax import create_model
        >>> backbone = create_model("resnet50", attention="hga", features_only=True)
        >>> [(info.channels, info.stride) for info in backbone.feature_info()]
        [(256, 4), (512, 8), (1024, 16), (2048, 32)]
        >>> variables = backbone.init(jax.random.key(0), images)  # doctest: +SKIP
        >>> maps = jax.jit(backbone.apply)(variables, images)  # doctest: +SKIP
    """

    network: nn.Module

    def setup(self) -> None:
        nn.share_scope(self, self.network)

    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, ...]:
        return tuple(y for _, y in self._maps(x, train))

    def _maps(self, x: jax.Array, train: bool = False) -> list[tuple[str, jax.Array]]:
        """Returns the name and the output of the last module of each stage."""
        last: dict[str, tuple[str, jax.Array]] = {}

        def keep(call: Any, arguments: tuple, options: dict[str, Any], context: Any) -> Any:
            result, module = call(*arguments, **options), context.module
            if module.parent is self.network and context.method_name == "__call__":
                stage = _STAGE.match(module.name)
                if stage:
                    last[stage[0]] = module.name, result
            return result

        with nn.intercept_methods(keep):
            self.network(x, train)
        return list(last.values())

    def feature_info(self, channels: int = 3) -> tuple[StageInfo, ...]:
        """Describes each map, in the order in which they are returned, without computing anything.

        Args:
            channels: number of channels of the images.
        """
        module = self.clone(network=self.network.clone(axis_name=None))
        names: list[str] = []

        def shapes(key: jax.Array) -> list[jax.Array]:
            maps, _ = module.init_with_output(key, jnp.zeros((1, _SIZE, _SIZE, channels)), method=StageMaps._maps)
            names.extend(name for name, _ in maps)
            return [y for _, y in maps]

        maps = jax.eval_shape(shapes, jax.random.key(0))
        return tuple(StageInfo(name, y.shape[-1], _SIZE // y.shape[1]) for name, y in zip(names, maps, strict=True))
