"""Are all weights of a folder's GGUF file, as gguf-py dequantizes them, those of the dense folder?

Every tensor must be there and every value the same number: nothing is allowed for rounding.
"""

import collections
import sys

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES

from llama import HEAD, Llama, differences, judge, read_config, reference

TYPES = gguf.GGMLQuantizationType
Q2_0 = 42
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def teach_q2_0():
    """gguf-py 0.19.0 is older than llama.cpp's type 42: 64 two-bit codes after one f16."""
    if Q2_0 in TYPES._value2member_map_:
        return
    member = int.__new__(TYPES, Q2_0)
    member._name_, member._value_ = "Q2_0", Q2_0
    TYPES._member_map_["Q2_0"] = TYPES._value2member_map_[Q2_0] = member
    GGML_QUANT_SIZES[member] = (64, 18)


def values(tensor):
    if tensor.tensor_type != Q2_0:
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    blocks = np.ascontiguousarray(tensor.data).reshape(-1, 18)
    scale = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
    codes = blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    return scale * (codes.reshape(-1, 64).astype(np.float32) - 1)


def gguf_name(name):
    base, part = name.rsplit(".", 1)
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    if base in top:
        return f"{top[base]}.{part}"
    block, inner = base.removeprefix("model.layers.").split(".", 1)
    return f"blk.{block}.{NAMES[inner]}.{part}"


def interleaved(model, name, value):
    """Rows of q and k in the order of a rotation of neighbours."""
    heads = {"q_proj": model.heads, "k_proj": model.kv_heads}.get(name.split(".")[-2])
    if not heads:
        return value
    halves = value.reshape(heads, 2, value.shape[0] // heads // 2, -1)
    return halves.swapaxes(1, 2).reshape(value.shape)


def check(folder, _):
    teach_q2_0()
    config, expected = read_config(folder), reference(folder)
    if config.get("tie_word_embeddings", False):
        del expected[HEAD]
    model = Llama(config, {})
    tensors = gguf.GGUFReader(folder / "model.gguf").tensors
    stored = {tensor.name: tensor for tensor in tensors if tensor.name != "rope_freqs.weight"}
    wrong, kinds = [], collections.Counter()
    for name, value in expected.items():
        tensor = stored.pop(gguf_name(name), None)
        if tensor is None:
            wrong.append(f"{name} is missing")
            continue
        kinds[tensor.tensor_type.name] += 1
        wanted = interleaved(model, name, value.astype(np.float32)).reshape(-1)
        changed = differences(values(tensor).reshape(-1), wanted)
        wrong += [f"{name}: {changed} values differ"] if changed else []
    wrong += [f"{name} is not in the dense folder" for name in stored]
    shown = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    return "fails" if wrong else "exact", "; ".join([f"{shown}, {len(wrong)} wrong", *wrong[:3]])


if __name__ == "__main__":
    sys.exit(judge(__doc__, check))
