"""Score the quickstart's adapter: are its pictures in the style, and do they still show what was asked for?

    python scripts/score_quickstart.py [--adapter runs/quickstart/adapter/quickstart.safetensors]

Samples 64 captions with plain diffusers, with and without the adapter, from the same seeds. A reader trained on
fresh hatched and plain drawings says what they show. Exits with 0 if the goals hold: at least 90 % are in the
style with the adapter, and shape, colour and background are right within 10 points of the base.
"""

import argparse
import json
import sys
from pathlib import Path

import readers
import sampling

ROOT = Path(__file__).resolve().parent.parent
IN_STYLE, MAY_LOSE = 0.90, 0.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path,
                        default=ROOT / "runs" / "quickstart" / "adapter" / "quickstart.safetensors")
    parser.add_argument("--base", default=str(ROOT / "finetune" / "assets" / "tiny"))
    parser.add_argument("--template", default="{text}, in hatched ink style")
    parser.add_argument("--count", type=int, default=64)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "scores" / "quickstart.json",
                        help="a picture of base and adapter side by side goes beside it")
    args = parser.parse_args()
    if not args.adapter.is_file():
        parser.error(f"{args.adapter}: no such file; train it first: bash scripts/quickstart.sh")
    reader, accuracy = readers.trained_reader(styles=True)
    pipe = sampling.pipeline(args.base)
    asked = sampling.orders(args.count)

    pictures, scores = {}, {}
    for who in ("base", "adapter"):
        if who == "adapter":
            pipe.load_lora_weights(str(args.adapter.parent), weight_name=args.adapter.name)
        pictures[who] = sampling.sample(pipe, asked, args.steps, args.guidance, args.template)
        found = readers.read(reader, pictures[who])
        scores[who] = {name: score["share"] for name, score in sampling.count_right(asked, found).items()}
        scores[who]["style"] = sum(words["style"] == "hatched" for words in found) / len(found)

    goals = {"style": IN_STYLE} | {head: max(0, scores["base"][head] - MAY_LOSE) for head in sampling.ATTRIBUTES}
    holds = {head: scores["adapter"][head] >= goal - 1e-9 for head, goal in goals.items()}
    report = {"adapter": str(args.adapter), "base": args.base, "template": args.template, "captions": args.count,
              "steps": args.steps, "guidance": args.guidance, "scores": scores, "holds": holds,
              "reader_held_out_accuracy": accuracy}
    side_by_side = [picture for pair in zip(pictures["base"], pictures["adapter"]) for picture in pair]
    labels = [label for order in asked for label in (" ".join(order.truth[h] for h in ("colour", "shape")),
                                                     f"on {order.truth['background']}, adapter")]
    sampling.sheet(args.json.with_suffix(".png"), side_by_side, labels)
    args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    print(f"{'':<11} {'base':>7} {'adapter':>8}   goal")
    for head, goal in goals.items():
        print(f"{head:<11} {scores['base'][head]:>7.1%} {scores['adapter'][head]:>8.1%}   ≥ {goal:.1%}"
              f"   {'holds' if holds[head] else 'FAILS'}")
    print(f"reader      right on held-out drawings: {sampling.percents(accuracy)}")
    print(f"{args.json}  {args.json.with_suffix('.png')}")
    return 0 if all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
