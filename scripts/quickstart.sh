#!/usr/bin/env bash
# From nothing to an adapter and a picture of what it learned, on the bundled tiny base. Prints both paths at the end.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/setup.sh" 8bit

accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
  -m finetune train recipes/quickstart.yaml
adapter=runs/quickstart/adapter/quickstart.safetensors
picture=runs/quickstart/before_after.png
finetune sample --base tiny --adapter "$adapter" --strengths 0,0.5,1 --guidance 2 --seed 7 \
  --prompts recipes/quickstart_prompts.txt --out runs/quickstart/samples --overwrite --grid "$picture"
echo
echo "adapter: $adapter"
echo "picture: $picture"
