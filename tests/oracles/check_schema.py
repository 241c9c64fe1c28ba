"""The recipes' JSON schema holds for every shipped recipe, and points at what is wrong in others.

    python check_schema.py FEWBIT RECIPES
"""

import copy
import json
import pathlib
import subprocess
import sys
import tomllib

import jsonschema

fewbit, recipes = sys.argv[1], pathlib.Path(sys.argv[2])
schema = json.loads(subprocess.run([fewbit, "recipes", "schema"], check=True, capture_output=True).stdout)
jsonschema.Draft202012Validator.check_schema(schema)
validator = jsonschema.Draft202012Validator(schema)

files = sorted(recipes.glob("*.toml"))
assert files
for file in files:
    for error in validator.iter_errors(tomllib.loads(file.read_text())):
        sys.exit(f"{file.name}: {error.json_path}: {error.message}")

right = tomllib.loads((recipes / "upq_int2.toml").read_text())
distill = next(i for i, stage in enumerate(right["stage"]) if "distill" in stage)


def wrong(change, path):
    recipe = copy.deepcopy(right)
    change(recipe)
    found = [error.json_path for error in validator.iter_errors(recipe)]
    assert found == [path], f"expected one error at {path}, found {found}"


wrong(lambda r: r["quant"].update(bitz=3), "$.quant")
wrong(lambda r: r["quant"].update(bits="four"), "$.quant.bits")
wrong(lambda r: r["quant"].update(bits=9), "$.quant.bits")
wrong(lambda r: r["stage"][distill]["distill"].update(stesp=3), f"$.stage[{distill}].distill")
wrong(lambda r: r["stage"][distill]["distill"].update(method={"seqq": {}}), f"$.stage[{distill}].distill.method")
print(f"schema: {len(files)} recipes hold, 5 slips are found where they are")
