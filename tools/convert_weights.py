#!/usr/bin/env python3
"""Convert any CLIP checkpoint to one safetensors file; the same as `npclip convert`.

python tools/convert_weights.py SOURCE TARGET [--dtype float32|float16|bfloat16]
"""

import sys

from npclip.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
