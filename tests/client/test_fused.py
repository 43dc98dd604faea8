"""Norms and rotary embeddings as one step of autograd each."""

import resource
import subprocess
import sys

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXModel, LlamaConfig, LlamaModel
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from fedstrata.client.fused import is_rms_norm, quick, rms_norm, rotary, turns


def norm(width: int = 6) -> LlamaRMSNorm:
    module = LlamaRMSNorm(width).requires_grad_(False)
    module.weight.copy_(torch.linspace(0.5, 2, width))
    return module


def test_a_norm_divides_by_the_root_mean_square() -> None:
    x = torch.tensor([[3.0, 4.0]])  # mean of squares 12.5
    assert torch.allclose(rms_norm(x, torch.tensor([1.0, 2.0]), 0.0), torch.tensor([[3.0, 8.0]]) / 12.5**0.5)


def test_values_and_gradients_are_the_norms_own() -> None:
    module, draw = norm(), torch.Generator().manual_seed(0)
    x, seen = (torch.randn(2, 3, 6, generator=draw) for _ in range(2))
    x.requires_grad_()
    theirs, ours = module(x), rms_norm(x, module.weight, module.variance_epsilon)
    assert torch.allclose(ours, theirs, rtol=1e-6)
    (wanted,) = torch.autograd.grad(theirs, x, seen)
    (found,) = torch.autograd.grad(ours, x, seen)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_norm_that_does_something_else_is_left_alone() -> None:
    assert is_rms_norm(norm())
    assert not is_rms_norm(GemmaRMSNorm(6).requires_grad_(False))  # multiplies by 1 + weight
    assert not is_rms_norm(LlamaRMSNorm(6))  # its weight is trained
    assert not is_rms_norm(norm().double())
    assert not is_rms_norm(nn.LayerNorm(6))


@pytest.mark.parametrize("heads", [1, 4])
def test_queries_and_keys_turn_as_llamas_do(heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 5, count, 8, generator=draw).transpose(1, 2).requires_grad_() for count in (4, heads))
    cos, sin = (torch.rand(1, 5, 8, generator=draw) for _ in range(2))  # the halves differ, as no model's do
    theirs, ours = modeling_llama.apply_rotary_pos_emb(q, k, cos, sin), rotary(q, k, cos, sin)
    seen = [torch.randn(part.shape, generator=draw) for part in theirs]
    wanted, found = (torch.autograd.grad(list(parts), [q, k], seen) for parts in (theirs, ours))
    for mine, other in zip((*ours, *found), (*theirs, *wanted), strict=True):
        assert torch.allclose(mine, other, rtol=1e-5, atol=1e-6)


def test_models_that_turn_otherwise_are_left_alone() -> None:
    assert turns(modeling_llama.__name__)
    assert not turns(modeling_gptj.__name__)  # interleaves the halves
    assert not turns("torch.nn.modules.linear")


def test_everything_is_as_before_once_it_is_closed() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaModel(LlamaConfig(vocab_size=4, **sizes)).requires_grad_(False)
    plain, x = modeling_llama.apply_rotary_pos_emb, torch.linspace(-1, 1, 48).view(2, 3, 8)
    before, half = model(inputs_embeds=x).last_hidden_state, model.norm(x.bfloat16())
    with quick(model):
        assert "forward" in vars(model.norm)
        assert modeling_llama.apply_rotary_pos_emb is not plain
        assert torch.allclose(model(inputs_embeds=x).last_hidden_state, before, atol=1e-5)
        assert torch.equal(model.norm(x.bfloat16()), half)  # its own way: no quick one for narrow numbers
    assert "forward" not in vars(model.norm)
    assert modeling_llama.apply_rotary_pos_emb is plain
    assert torch.equal(model(inputs_embeds=x).last_hidden_state, before)


def test_a_model_that_turns_a_part_of_each_head_keeps_its_own_way() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = GPTNeoXModel(GPTNeoXConfig(vocab_size=4, **sizes)).eval().requires_grad_(False)  # a quarter of each
    x = torch.linspace(-1, 1, 96).view(1, 3, 32)
    before = model(inputs_embeds=x).last_hidden_state
    with quick(model):
        assert torch.equal(model(inputs_embeds=x).last_hidden_state, before)


PAGES = """
import resource, torch
from fedstrata.client.loading import keep_freed
keep_freed()
def step():
    return [torch.ones(2**18) for _ in range(8)]  # 8 MB
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the GNU C library's allocator")
def test_freed_memory_is_used_again() -> None:
    done = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20 * 8 * 2**20 / resource.getpagesize() / 10
