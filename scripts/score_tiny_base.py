"""Score the tiny base: does what it samples show what was asked for? And how much does its VAE lose?

    python scripts/score_tiny_base.py [--base finetune/assets/tiny] [--json runs/scores/tiny_base.json]

Samples one picture for each of 512 captions (every shape × colour × background) with plain diffusers and has a
reader, trained on fresh drawings, say what they show.
"""

import argparse
import json
import random
import time
from pathlib import Path

import readers
import sampling
import torch
import world
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@torch.no_grad()
def through_vae(vae, drawn: list[Image.Image]) -> tuple[float, list[Image.Image]]:
    """Mean PSNR of the drawings after encoding (posterior mean) and decoding, in dB, and the decoded drawings."""
    psnr, decoded = [], []
    for i in range(0, len(drawn), 32):
        x = readers.tensor(drawn[i:i + 32])
        y = (vae.decode(vae.encode(2 * x - 1).latent_dist.mean).sample / 2 + 0.5).clamp(0, 1)
        psnr += (-10 * (x - y).square().mean((1, 2, 3)).log10()).tolist()
        decoded += [Image.fromarray(p) for p in (y.permute(0, 2, 3, 1) * 255).round().byte().numpy()]
    return sum(psnr) / len(psnr), decoded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=str(ROOT / "finetune" / "assets" / "tiny"))
    parser.add_argument("--count", type=int, default=512, help="captions, at most 512")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / "scores" / "tiny_base.json",
                        help="the picture of the first 64 samples goes beside it")
    args = parser.parse_args()
    begin = time.time()
    reader, accuracy = readers.trained_reader(styles=False)
    pipe = sampling.pipeline(args.base)

    rng = random.Random("drawings for the VAE")
    scenes = [world.random_scene(rng) for _ in range(256)]
    psnr, decoded = through_vae(pipe.vae, [world.draw(scene) for scene in scenes])
    single = [(readers.truth(scene), picture) for scene, picture in zip(scenes, decoded) if len(scene.things) == 1]
    kept = readers.read(reader, [picture for _, picture in single])
    still_right = sum(all(truth[head] == words[head] for head in sampling.ATTRIBUTES)
                      for (truth, _), words in zip(single, kept)) / len(single)

    asked = sampling.orders(args.count)
    pictures = sampling.sample(pipe, asked, args.steps, args.guidance)
    found = readers.read(reader, pictures)
    right, worst = sampling.count_right(asked, found), sampling.confusions(asked, found)

    report = {"base": args.base, "captions": args.count, "steps": args.steps, "guidance": args.guidance,
              "right": right, "confusions": worst, "vae_psnr_db": round(psnr, 2),
              "read_right_after_vae": round(still_right, 4), "reader_held_out_accuracy": accuracy,
              "minutes": round((time.time() - begin) / 60, 1)}
    labels = [("" if all(order.truth[h] == words[h] for h in sampling.ATTRIBUTES) else "! ")
              + " ".join(order.truth[h] for h in ("colour", "shape", "background"))
              for order, words in zip(asked, found)]
    sampling.sheet(args.json.with_suffix(".png"), pictures[:64], labels)
    args.json.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")

    for name, score in right.items():
        low, high = score["interval"]
        print(f"{name:<11} {score['share']:6.1%}   95 % interval {low:.1%} to {high:.1%}")
    print(f"VAE         {psnr:.2f} dB PSNR on 256 fresh drawings; {still_right:.1%} are still read all right")
    print(f"reader      right on held-out drawings: {sampling.percents(accuracy)}")
    print("worst       " + "\n            ".join(worst or ["nothing is wrong"]))
    print(f"{args.json}  {args.json.with_suffix('.png')}  {report['minutes']} min")


if __name__ == "__main__":
    main()
