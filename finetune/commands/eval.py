"""Measure adapters beside their base: the same prompts and seeds, with intervals."""

from pathlib import Path

from finetune import registry
from finetune.commands import _base
from finetune.commands.sample import check_free
from finetune.disk import write_json
from finetune.errors import FinetuneError


def add_arguments(parser) -> None:
    parser.add_argument("adapters", nargs="+", metavar="ADAPTER|RUN",
                        help="a file, FILE:STRENGTH, or a run folder with all it trained")
    _base.add_arguments(parser)
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE", help="as `finetune sample` reads them")
    parser.add_argument("--seeds", type=int, default=4, metavar="N",
                        help="pictures of each prompt, with the seeds 0, 1, …; 4 if not given")
    parser.add_argument("--metric", action="append", default=[], metavar="NAME[:MODEL]", dest="metrics",
                        help="can be repeated; if left out, all that what is given allows. MODEL is a local folder or a hub "
                             "id of transformers; `pixels` looks without a network. Metrics: "
                             + ", ".join(registry.names("metrics")))
    parser.add_argument("--images", metavar="FOLDER", help="training pictures: for clip_i, dino, copying, kid and fid")
    parser.add_argument("--plain", type=Path, metavar="FILE", help="prompts that name nothing that was learned: for drift")
    parser.add_argument("--steps", type=int, help="25 if not given")
    parser.add_argument("--guidance", type=float, help="5 if not given; 1 is without")
    parser.add_argument("--size", metavar="WxH", help="in pixels; the base's own if not given")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--batch", type=int, default=8, help="pictures sampled together")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR",
                        help="pictures, sheet.png, nearest.png and eval.json go there")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there already")
    parser.add_argument("--json", action="store_true", help="print eval.json in place of the table")


def run(args) -> int:
    from finetune.train.jobs import jobs, read

    if args.batch < 1 or args.seeds < 1:
        raise FinetuneError(f"--batch {args.batch} --seeds {args.seeds}: at least 1 of each")
    dtype = _base.dtype(args.dtype)
    given = {key: value for key in ("steps", "guidance", "size") if (value := getattr(args, key)) is not None}
    given["count"] = args.seeds
    wanted, plain = (jobs(read(file), given) if file else [] for file in (args.prompts, args.plain))

    from finetune import device
    from finetune.train import adapters, evaluate, sampling

    who = evaluate.subjects(args.adapters)
    files = {one.name: evaluate.places(args.out / one.name, wanted) for one in who}
    plainly = {one.name: evaluate.places(args.out / one.name / "plain", plain) for one in who if plain}
    check_free([args.out / "eval.json", *sum(files.values(), []), *sum(plainly.values(), [])], args.overwrite)
    learned = evaluate.training(args.images) if args.images else None
    texts = [job.prompt for job in wanted]
    known = {"training": learned, "plain": plain, "seeds": all(texts.count(text) > 1 for text in set(texts)),
             "many": learned and min(len(texts), len(learned)) >= evaluate.MANY}
    metrics = evaluate.metrics(args.metrics, {key for key, there in known.items() if there})
    family = _base.load(args, dtype)
    for part in family.parts.values():
        part.to(device.best())
    loaded = {one.name: adapters.load(one.files, family) for one in who}
    with adapters.on(family, []):
        wanted, plain = sampling.settle(family, wanted), sampling.settle(family, plain)
    learned = learned and learned.cut(wanted[0].size)
    eyes = evaluate.eyes(metrics, texts)

    for one in who:
        for todo, places, what in ((wanted, files, ""), (plain, plainly, ", plain")):
            if todo:
                places[one.name][0].parent.mkdir(parents=True, exist_ok=True)
                for _ in sampling.paint(family, loaded[one.name], todo, places[one.name], args.batch, f"{one.name}{what}"):
                    pass
    found = evaluate.measure(metrics, eyes, evaluate.painted(wanted, files, plainly, learned))
    evaluate.sheet(wanted, files).save(args.out / "sheet.png")
    copies = []
    if "copies" in found:
        copies, beside = evaluate.nearest(found["copies"]["of"], files, learned)
        beside.save(args.out / "nearest.png")
    numbers = evaluate.numbers(found)
    result = evaluate.result(family.source.name, who, wanted, plain, numbers, copies)
    write_json(args.out / "eval.json", result)
    print((args.out / "eval.json").read_text(encoding="utf-8") if args.json else
          f"{evaluate.table(numbers)}\n{len(texts)} pictures of each in {args.out}, with sheet.png and eval.json")
    return 0
