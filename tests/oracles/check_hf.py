"""Loads folders with transformers (compressed-tensors, auto-round): logits, and the weights of modules that hold them unpacked."""

import sys
import warnings

import torch
import transformers

from llama import TOKENS, Llama, Verdict, differences, folders, read_config, reference, relative


def check(folder):
    expected, _ = reference(folder)
    config = read_config(folder)
    half = config["quantization_config"]["quant_method"] != "compressed-tensors"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16 if half else torch.float32, device_map="cpu"
    ).eval()
    with torch.no_grad():
        logits = model(torch.tensor([TOKENS])).logits[0].float().numpy()
    error = relative(logits, Llama(config, expected).logits(TOKENS))
    compared = changed = 0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, torch.nn.Linear) and weight is not None and weight.is_floating_point():
            name = "model.embed_tokens" if name == "lm_head" and config["tie_word_embeddings"] else name
            wrong, _ = differences(weight.detach().float().numpy(), expected[name + ".weight"])
            compared, changed = compared + 1, changed + (wrong if not half else 0)
    kind = type(model.model.layers[0].self_attn.q_proj).__name__
    passed = error < (1e-2 if half else 2e-5) and changed == 0
    return passed, f"{kind}: {compared} dense weights, {changed} values changed; logits {error:.1e}"


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    verdict = Verdict()
    for folder in folders(__doc__):
        section = read_config(folder)["quantization_config"]
        groups = section.get("config_groups", {}).values()
        if any(32 % group["weights"]["num_bits"] for group in groups):
            print(f"skip {folder.name:28s} packed otherwise by this compressed-tensors")
            continue
        try:
            verdict.say(folder, *check(folder))
        except Exception as error:  # a loader may fail in any way, and the next folder counts too
            verdict.say(folder, False, f"{type(error).__name__}: {str(error)[:300]}")
    return verdict.exit_code()


if __name__ == "__main__":
    sys.exit(main())
