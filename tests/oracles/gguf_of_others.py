"""A tiny Llama as gguf-py writes it, with what it should compute: a fixture for reading files of others.

    python gguf_of_others.py FOLDER

writes FOLDER/tiny.gguf (block types that fewbit reads but never writes among them) and
FOLDER/tiny.json: token ids of a text as llama.cpp cuts it, and logits behind them in float64.
"""

import json
import sys
from pathlib import Path

import gguf
import numpy as np

from check_gguf import gguf_name
from check_llamacpp import Server
from llama import Llama

TEXT = "the cat sat on the mat, été"
WIDTH, INNER, BLOCKS, HEADS, KV_HEADS = 32, 64, 2, 4, 2
WORDS = "the cat sat on mat".split()
CONFIG = {
    "model_type": "llama",
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
}
KINDS = ["Q5_0", "Q5_1", "Q4_0", "Q4_1", "Q8_0", "F16", "BF16"]


def pieces():
    """Special pieces, bytes, letters, and the words with everything on the way to them."""
    made = {"▁" + word[:end] for word in WORDS for end in range(1, len(word) + 1)}
    made |= {word[:end] for word in WORDS for end in range(1, len(word) + 1)}
    letters = {letter for piece in made for letter in piece} | {"▁"}
    longer = sorted(made - letters, key=lambda piece: (len(piece), piece))
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    bytes_ = [(f"<0x{byte:02X}>", 6) for byte in range(256)]
    normal = [(piece, 1) for piece in longer + sorted(letters)]
    return special + bytes_ + normal


def tensors(vocab, random):
    """Weights under the names of Hugging Face."""
    head = WIDTH // HEADS
    shapes = {"model.embed_tokens": [vocab, WIDTH], "lm_head": [vocab, WIDTH]}
    for block in range(BLOCKS):
        at = f"model.layers.{block}."
        shapes |= {
            at + "self_attn.q_proj": [HEADS * head, WIDTH],
            at + "self_attn.k_proj": [KV_HEADS * head, WIDTH],
            at + "self_attn.v_proj": [KV_HEADS * head, WIDTH],
            at + "self_attn.o_proj": [WIDTH, HEADS * head],
            at + "mlp.gate_proj": [INNER, WIDTH],
            at + "mlp.up_proj": [INNER, WIDTH],
            at + "mlp.down_proj": [WIDTH, INNER],
            at + "input_layernorm": [WIDTH],
            at + "post_attention_layernorm": [WIDTH],
        }
    shapes["model.norm"] = [WIDTH]
    for name, shape in shapes.items():
        noise = random.standard_normal(shape).astype(np.float32)
        yield name + ".weight", 1 + 0.1 * noise if len(shape) == 1 else 0.3 * noise


def turned(weight, heads):
    """Rows of half-split heads in the order of neighbouring pairs."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def turned_back(weight, heads):
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write(path, random):
    """The file; gives the weights that it stands for, under the names of Hugging Face."""
    vocabulary = pieces()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(BLOCKS)
    writer.add_context_length(CONFIG["max_position_embeddings"])
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(CONFIG["rms_norm_eps"])
    writer.add_rope_freq_base(CONFIG["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _ in vocabulary])
    writer.add_token_types([kind for _, kind in vocabulary])
    writer.add_token_scores([-float(rank) if kind == 1 else 0.0 for rank, (_, kind) in enumerate(vocabulary)])
    for key, value in [("bos", 1), ("eos", 2), ("unk", 0)]:
        getattr(writer, f"add_{key}_token_id")(value)
    writer.add_add_bos_token(True)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    stored = {}
    for index, (name, weight) in enumerate(tensors(len(vocabulary), random)):
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        kind = gguf.GGMLQuantizationType[KINDS[index % len(KINDS)] if weight.ndim == 2 else "F32"]
        data = gguf.quants.quantize(turned(weight, heads) if heads else weight, kind)
        writer.add_tensor(gguf_name(name), data, raw_dtype=kind)
        back = gguf.quants.dequantize(data, kind)
        stored[name] = np.ascontiguousarray(turned_back(back, heads) if heads else back, np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return stored


def main():
    folder = Path(sys.argv[1])
    stored = write(folder / "tiny.gguf", np.random.default_rng(7))
    # Starts with BOS.
    ids = Server(str(folder / "tiny.gguf"), CONFIG["max_position_embeddings"]).ids(TEXT)
    logits = Llama(CONFIG, stored).logits(ids)[-1]
    about = {"text": TEXT, "tokens": ids, "logits": [round(float(value), 6) for value in logits]}
    (folder / "tiny.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
