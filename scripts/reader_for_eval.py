"""Write the tiny base's attribute reader as one file for `finetune eval --metric attributes:FILE`.

    python scripts/reader_for_eval.py reader.safetensors
"""

import json
import sys

import readers
from safetensors.torch import save_file

reader, accuracy = readers.trained_reader(styles=True)
strides = [layer.stride[0] for layer in reader.body[::3]]
save_file(reader.state_dict(), sys.argv[1], {"reader": json.dumps({"size": 64, "strides": strides, "heads": readers.HEADS})})
print(f"{sys.argv[1]}: right of fresh drawings " + ", ".join(f"{head} {share:.1%}" for head, share in accuracy.items()))
