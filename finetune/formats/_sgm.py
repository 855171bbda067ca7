"""The module names of SDXL's UNet in the code that it was published with, which is how every tool reads kohya's files.

All layers of its three blocks are counted through (Stability-AI/generative-models, openaimodel.py)."""

PLACES = {
    "conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2", "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2",
}
for block in range(3):
    for what, place in (("resnets", 0), ("attentions", 1)):
        PLACES |= {f"down_blocks.{block}.{what}.{layer}": f"input_blocks.{1 + 3 * block + layer}.{place}" for layer in range(2)}
        PLACES |= {f"up_blocks.{block}.{what}.{layer}": f"output_blocks.{3 * block + layer}.{place}" for layer in range(3)}
    PLACES[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 + 3 * block}.0.op"
    PLACES[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{2 + 3 * block}.2.conv"
RESNET = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def to_sgm(path: str) -> str:
    return _renamed(path, PLACES, RESNET)


def from_sgm(path: str) -> str:
    """Also for a path of diffusers, which stays as it is."""
    return _renamed(path, {theirs: ours for ours, theirs in PLACES.items()}, {theirs: ours for ours, theirs in RESNET.items()})


def _renamed(path: str, places: dict[str, str], layers: dict[str, str]) -> str:
    place = max((place for place in places if f"{path}.".startswith(f"{place}.")), key=len, default=None)
    if place is None:
        return path
    layer = path[len(place) + 1:]
    return f"{places[place]}.{layers.get(layer, layer)}".rstrip(".")
