"""The loop: every method, family and objective goes through here."""

from contextlib import nullcontext, suppress
from functools import partial

import torch
from tqdm import tqdm

from finetune.batch import Batch
from finetune.errors import FinetuneError
from finetune.methods.base import restore
from finetune.optim.optimizer import load_state, state_tensors
from finetune.optim.schedule import factor
from finetune.train import checkpoint, preview, trackers
from finetune.train.alarm import AFTER, alarms, traces
from finetune.train.best import criterion, history, note, over
from finetune.train.lean import lean, wanted
from finetune.train.release import released
from finetune.train.setup import Run, seed_step, to_device
from finetune.train.stop import Stop, Stopped
from finetune.train.validate import validate
from finetune.train.window import GIVE_UP, Window, rewind, write


def train(run: Run, start: int, window: Window, stop: Stop) -> None:
    """Steps `start` … max_steps − 1, with logs, previews and checkpoints on the way; a checkpoint at the end.

    Raises Stopped after saving when it was asked for, FinetuneError when the numbers are no longer finite."""
    recipe, accelerator, main = run.recipe, run.accelerator, run.accelerator.is_main_process
    every, last = recipe.every, recipe.train.max_steps
    watched = min(AFTER, last)
    before = traces(run.parameters) if start < watched else []
    run.model.train()       # once: it visits every module, and what rests the parts for a while puts them back
    bar = tqdm(total=last, initial=start, unit="step", disable=not main, dynamic_ncols=True)
    if every.preview and start % every.preview == 0 and not run.folder.preview(start).exists():
        show(run, start, stop)
        if stopped := stop.received(accelerator):       # nothing is new since the start
            raise Stopped(stopped)
    if every.validate and (start % every.validate == 0 or start == last):
        validate(run, start)
    if over(run):
        return
    for step, batches in zip(range(start, last), run.loader.run(range(start, last))):
        loss, norm = one_step(run, step, batches)
        window.add(loss, norm, sum(len(batch.positions) for batch in batches))
        done = step + 1
        bar.update()
        if done % every.log == 0 or done == last:
            bar.set_postfix(window.close(done), refresh=False)
        if done == watched and main:
            for alarm in alarms(run, before, done, norm):
                run.say(alarm)
                write(run, {"step": done, "alarm": alarm})
        stopped = stop.received(accelerator)
        if done == last or stopped or window.skipped >= GIVE_UP or (every.checkpoint and done % every.checkpoint == 0):
            save(run, done, window)
        window.check(done)
        shows = every.preview and done % every.preview == 0
        validates = every.validate and (done % every.validate == 0 or done == last)
        if shows and not stopped:
            show(run, done, stop)
            if stopped := stop.received(accelerator):
                save(run, done, window)
        if validates:
            validate(run, done)
        if stopped:
            bar.close()
            raise Stopped(stopped)
        if (shows or validates) and done < last and over(run):
            run.say(f"{criterion(recipe)[0]} was not better the last {recipe.train.patience} times: it ends")
            save(run, done, window)
            break
    bar.close()


def one_step(run: Run, step: int, batches: list[Batch]) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer step over this process's batches, whose losses are summed up. It is not applied when a loss or the
    gradient is not finite. Returns the sum and the norm of the gradient, both still on the device."""
    recipe, accelerator = run.recipe.train, run.accelerator
    run.optimizer.train()
    for group in run.optimizer.param_groups:
        group["now"] = step
        group["lr"] = 0.0 if step >= group["until"] else group["peak_lr"] * factor(
            step=step, max_steps=recipe.max_steps, warmup_steps=recipe.warmup_steps,
            **recipe.schedule.model_dump(exclude_none=True))
    total, parameters = torch.zeros((), device=accelerator.device), run.parameters.values()
    with released(run.optimizer.optimizer, partial(apply, run)) if recipe.gradient_release else nullcontext() as norms:
        for batch in batches:
            seed_step(recipe.seed, batch.positions[0])
            light = lean() if wanted(recipe, accelerator.device) else nullcontext()
            with light, nullcontext() if batch is batches[-1] else accelerator.no_sync(run.model):
                with torch.compiler.set_stance("default") if recipe.compile else nullcontext():     # what is compiled is used
                    loss = run.model(to_device(batch, accelerator.device))
                    # × 1, or × NaN when this loss is not finite: then no process's gradient is, for they are averaged.
                    accelerator.backward(loss * (1 + 0 * loss.detach()))    # which may run blocks once more
            total += loss.detach()
    if norms is None:
        norm = accelerator.clip_grad_norm_(parameters, recipe.clip_norm or float("inf"))
        apply(run, norm)
    else:
        norm = torch.stack(norms).norm()
    run.method.after_step()
    run.optimizer.eval()        # between steps the parameters are what is shown and saved; schedule-free steps elsewhere
    for p in parameters:        # not the optimizer's: of bfloat16 weights it holds others (optim/rounding.py)
        p.grad = None
    if run.ema:
        run.ema.update(step)
    return total, norm


def apply(run: Run, norm: torch.Tensor) -> None:
    """The optimizer's step, unless the gradient is not finite. A fused optimizer reads that on the device, as the scaler of
    float16 has it; for any other the number is waited for (docs/decisions/0009)."""
    optimizer = run.optimizer.optimizer
    if run.accelerator.scaler is not None:
        run.optimizer.step()
    elif getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~norm.isfinite()).float()
        run.optimizer.step()
    elif norm.isfinite():
        run.optimizer.step()


def save(run: Run, done: int, window: Window) -> None:
    """A checkpoint after `done` steps, by the main process. Raises FinetuneError for parameters that are not finite."""
    parameters = {name: p.detach().cpu().clone() for name, p in run.parameters.items()}
    if bad := [name for name, p in parameters.items() if not p.isfinite().all()]:
        raise FinetuneError(f"step {done}: {len(bad)} parameters are not finite ({bad[0]}); nothing of it is saved, the last "
                            "checkpoint stays. Lower train.learning_rate and start again with --fresh")
    if run.accelerator.is_main_process:
        tensors, plain = state_tensors(run.optimizer.optimizer)
        scaler = run.accelerator.scaler         # float16 alone has one, and its scale is history that a resume needs
        plain = {"state": plain, "scaler": scaler and scaler.state_dict(), "window": window.values()}
        state = checkpoint.State(done, parameters, tensors, plain,
                                 {n: t.cpu() for n, t in run.ema.average.items()} if run.ema else None)
        checkpoint.save(run.folder, state, run.recipe.train.keep_checkpoints, run.recipe.train.keep_every)
    run.accelerator.wait_for_everyone()


def resume(run: Run) -> tuple[int, Window]:
    """Put back the newest valid checkpoint. Returns the number of steps that are done, and those not logged yet."""
    main = run.accelerator.is_main_process
    state = checkpoint.newest(run.folder, run.say, tidy=main)
    if state is None:
        if main:
            rewind(run.folder, 0, 0, run.say)
        return 0, Window(run)
    restore(run.parameters, state.parameters)
    load_state(run.optimizer.optimizer, state.optimizer, state.plain["state"])
    if run.accelerator.scaler:
        run.accelerator.scaler.load_state_dict(state.plain["scaler"])
    if run.ema:
        for name, average in run.ema.average.items():
            average.copy_(state.ema[name])
    window = Window(run, **state.plain["window"])
    if main:
        rewind(run.folder, state.step, state.step - len(window.losses), run.say)
    return state.step, window


def show(run: Run, done: int, stop: Stop) -> None:
    """A grid of the base beside what is trained so far, and what the recipe has measured of it, unless the run is asked to
    stop meanwhile. Changes no bit of the training: it draws from its own seeds."""
    if run.accelerator.is_main_process:
        with suppress(Stopped), stop.raised_by(run.family.parts["denoiser"]), run.ema.swapped() if run.ema else nullcontext():
            found = preview.columns(run.recipe, run.family, run.method, run.base_pictures, done)
            run.base_pictures = found[0]
            if run.judge and done not in history(run.folder, run.judge.metrics[0].word):
                note(run, done, run.judge.of(found[1]))
            trackers.show(run.accelerator, preview.save(run.folder.preview(done), run.recipe, found, done), done)
    run.accelerator.wait_for_everyone()
