"""The main job, once through, on real weights and real text, on whatever machine this is.

    python -m experiments.demo [out=runs/demo] [steps=120] [a.b=c ...]

Loads SmolLM2-135M-Instruct, measures its perplexity on held-out entries of Ambrose Bierce's "The
Devil's Dictionary" (1911), teaches it the others by LoRA, measures again, shows an answer before
and after, and writes the loss curve, the checkpoint, a PEFT adapter and a merged Hugging Face
folder. Settings are those of configs/smollm2_lora.py. Run again, it goes on from its last
checkpoint; delete the folder to start over.
"""

if __name__ == "__main__":  # before the imports, which take seconds
    from experiments.command.start import start

    start(__doc__, "llmprep_jax.train.run:RunConfig")

import json
import pathlib

import rich
from rich.panel import Panel

import llmprep_jax as lp
from configs.smollm2_lora import get_config
from experiments.train import train
from llmprep_jax import cli
from llmprep_jax.config import look_up, only_overrides, override
from llmprep_jax.runs import open_data
from llmprep_jax.train.loop import lock_folder
from llmprep_jax.train.metrics import read_jsonl
from llmprep_jax.train.monitor import METRICS_FILE
from llmprep_jax.train.run import RunConfig

QUESTION = [{"role": "user", "content": "Define politics."}]


def main(arguments: list[str]) -> cli.Outputs:
    cfg = override(get_config(), ["out=runs/demo", "eval_batches=None", *only_overrides(arguments)])
    cfg = look_up(cfg)
    with lock_folder(cfg.out):
        return show(cfg)


def show(cfg: RunConfig) -> cli.Outputs:
    """The five parts of the demo."""
    rich.print("[bold]1. Load[/] SmolLM2-135M-Instruct")
    processor = lp.load_processor(cfg.model)
    base = lp.load_model(cfg.model, compute=cfg.compute)
    _, evaluate = open_data(cfg, processor)

    rich.print("[bold]2. Evaluate[/] on held-out entries of The Devil's Dictionary")
    before = evaluate(base)
    rich.print(f"   perplexity {before['eval_perplexity']:.2f}")
    answers = {"before": lp.generate(base, processor, QUESTION, max_new_tokens=60)}
    del base

    rich.print("[bold]3. Fine-tune[/] by LoRA, on answers only")
    result = train(cfg, mesh=None)
    if result.preempted:
        return {"checkpoints": cfg.out / "checkpoints", "to go on": "run the same command again"}

    rich.print("[bold]4. Evaluate[/] again")
    after = evaluate(result.model)
    rich.print(f"   perplexity {before['eval_perplexity']:.2f} -> {after['eval_perplexity']:.2f}")

    rich.print("[bold]5. Export[/]: folders are re-opened and compared before they are in place")
    adapter = lp.peft.save(result.model, cfg.out / "adapter")
    merged = lp.peft.merge(result.model)
    folder = lp.save_model(merged, cfg.out / "merged", processor=processor)
    answers["after"] = lp.generate(merged, processor, QUESTION, max_new_tokens=60)
    for when, answer in answers.items():
        rich.print(Panel(answer, title=f"{QUESTION[0]['content']} ({when})", width=90))

    curve = draw_loss(cfg.out, before, after)
    report = {"before": before, "after": after, "question": QUESTION, "answers": answers}
    (cfg.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return {
        "loss curve": curve,
        "metrics": cfg.out / METRICS_FILE,
        "TensorBoard": cfg.out / "tensorboard",
        "Orbax checkpoints": cfg.out / "checkpoints",
        "PEFT adapter": adapter,
        "merged Hugging Face folder": folder,
        "report": cfg.out / "report.json",
    }


def draw_loss(out: pathlib.Path, before: dict, after: dict) -> pathlib.Path:
    """Draws the training loss by step, with the held-out loss before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [row for row in read_jsonl(out / METRICS_FILE) if "loss" in row]
    steps, losses = [row["step"] for row in rows], [row["loss"] for row in rows]
    mean = [sum(losses[max(0, i - 9) : i + 1]) / min(i + 1, 10) for i in range(len(losses))]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(steps, losses, color="#9db4d6", linewidth=1, label="training, each step")
    axes.plot(steps, mean, color="#1f4e9c", linewidth=2, label="training, mean of 10 steps")
    ends = [0, steps[-1]]
    names = [f"{numbers['eval_perplexity']:.1f}" for numbers in (before, after)]
    label = f"held out: perplexity {names[0]} to {names[1]}"
    axes.plot(ends, [before["eval_loss"], after["eval_loss"]], "o--", color="#c44e2c", label=label)
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.set_title("SmolLM2-135M-Instruct learns The Devil's Dictionary by LoRA", loc="left")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(out / "loss.png", dpi=150)
    return out / "loss.png"


if __name__ == "__main__":
    cli.run(main)
