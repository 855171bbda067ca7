import pytest

from finetune.families._source import TINY


@pytest.fixture(scope="session")
def clip(tmp_path_factory) -> str:
    """A small CLIP with random weights and the tiny base's words."""
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = str(tmp_path_factory.mktemp("clip"))
    words = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.CLIPModel(transformers.CLIPConfig(
            text_config=small | {"vocab_size": len(words), "bos_token_id": words.bos_token_id,
                                 "eos_token_id": words.eos_token_id},
            vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=24))
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder
