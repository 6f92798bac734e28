"""Run by a Python with compressed-tensors: the weights that the library reads of a directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from safetensors.torch import load_file, save_file

    directory = Path(sys.argv[1])
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    settings = QuantizationConfig.model_validate(config["quantization_config"])
    schemes = {
        target: scheme for scheme in settings.config_groups.values() for target in scheme.targets
    }
    tensors = load_file(directory / "model.safetensors")
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    found = {}
    for key in [key for key in tensors if key.endswith(".weight_packed")]:
        name = key.removesuffix(".weight_packed")
        own = {
            k.removeprefix(f"{name}."): t for k, t in tensors.items() if k.startswith(f"{name}.")
        }
        scheme = schemes.get(name, schemes.get("Linear"))
        found[name] = compressor.decompress(own, scheme)["weight"].contiguous()
    save_file(found, sys.argv[2])
    print(json.dumps({"layers": len(found)}))


if __name__ == "__main__":
    main()
