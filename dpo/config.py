"""The configuration: everything that can be set.

Every key is one Field below: type, default, bounds and a line of help with the unit; `--help` and all messages are made
from these (dpo/settings.py). A part of the program takes its own section. Read next: dpo/train.py.
"""

import os
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Place = Annotated[str, AfterValidator(os.path.expanduser)]  # the shell leaves the ~ in key=~/rows.jsonl to us


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, no conversion between types, no NaN or infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The policy's weights."""

    path: Place = Field(
        "smollm2-135m-instruct",
        min_length=1,
        description="a folder, this name, tiny-random, or on the Hub ORG/NAME or ORG/NAME@REVISION",
    )
    adapter: Place = Field("", description='folder of a peft adapter to start with and train on; "" = none')
    experts: Literal["auto", "packed", "plain"] = Field(
        "auto",
        description="MXFP4 experts in memory: packed (frozen; 4.25 bits a value), plain, auto = packed with lora",
    )
    template_variables: list[str] = Field(
        ["enable_thinking=false"], description="what the chat template is told, NAME=VALUE each; nothing = []"
    )


class DataConfig(Section):
    """The preference rows and their split."""

    path: Place = Field(
        "checkable",
        min_length=1,
        description="checkable (made here), a row file, a folder of them, or a Hub dataset ORG/NAME[@REVISION][:FILE]",
    )
    format: Literal[
        Literal["auto", "judgebench", "llmbar", "rmbench", "together", "rb2"],
        Literal["ours", "ranked", "ultrafeedback", "binarized", "hh", "trl", "implicit"],
    ] = Field("auto", description="of the rows (dpo/formats.py); auto = by the keys of each file's first row")
    rows: int = Field(0, ge=0, description="most training rows, whole groups drawn after the split; 0 = all")
    pairs_per_row: int = Field(0, ge=0, description="the first N (chosen, rejected) pairs of a training row; 0 = all")
    orders: Literal["both", "one"] = Field(
        "both", description="in which verdicts on a training pair are trained: both, or one drawn by the seed"
    )
    max_tokens: int = Field(0, ge=0, description="most tokens of a prompt with one answer; 0 = as many as pack.tokens")
    too_long: Literal["error", "drop", "cut_prompt"] = Field(
        "error", description="a row beyond that: stop, drop it, or cut its prompt from the left (else drop it)"
    )
    split: Literal["group", "study"] = Field("group", description="by group without leaks, or the study's leaky way")
    validation_fraction: float = Field(0.1, ge=0, lt=1, description="share of the groups kept for validation")
    test_fraction: float = Field(0.2, ge=0, lt=1, description="share of the groups kept for the test")
    attack_share: float = Field(0.0, ge=0, le=1, description="share of the training rows whose wrong answers attack")
    attacks: list[str] = Field(
        ["verdict", "ignore", "turns"],
        min_length=1,
        description="how, one drawn for each of them (dpo/judge/attacks.py)",
    )


class CheckableConfig(Section):
    """The generated rows whose label code can prove (data.path=checkable)."""

    train_rows: int = Field(960, ge=1, description="training rows")
    validation_rows: int = Field(160, ge=0, description="validation rows")
    test_rows: int = Field(320, ge=1, description="test rows, of templates, topics, words and names unseen in training")
    subsets: list[str] = Field(
        ["Focus", "Precise IF", "Math", "Grounding"], min_length=1, description="in equal shares"
    )
    label_noise: float = Field(0.0, ge=0, lt=1, description="share of the training rows whose answers are swapped")
    length_confound: float = Field(
        0.0, ge=0, le=1, description="share of the training rows whose right answer is padded to be the longest"
    )
    length_counter: float = Field(
        0.0, ge=0, le=1, description="share whose wrong answer is then padded, by the same sentences, to be the longest"
    )
    difficulty: int = Field(2, ge=1, le=3, description="1 = easy, 3 = hard")
    rejected_per_row: Literal[1, 3] = Field(1, description="wrong answers in a row")


class PackConfig(Section):
    """The fixed shapes that everything is computed in."""

    tokens: int = Field(
        2048, ge=64, le=1_048_576, multiple_of=64, description="tokens of a packed batch; a branch must fit in it"
    )
    head_chunk: int = Field(128, ge=1, le=65_536, description="scored tokens that the output head takes at once")


class KernelsConfig(Section):
    """Which code computes the log-probs and the pairs' losses."""

    backend: Literal["auto", "torch", "triton", "bf16"] = Field(
        "auto",
        description="auto = the fastest; triton on a CPU needs TRITON_INTERPRET=1 (tests); bf16 = rounded as by others",
    )


class LossConfig(Section):
    """The preference loss."""

    name: str = Field("sigmoid", min_length=1, description="which loss: one of those listed at the end of --help")
    mix: list[str] = Field([], description="losses added to it, NAME:WEIGHT each, e.g. sft:0.1,ipo:0.5")
    beta: float = Field(0.1, gt=0, description="strength of the pull to the reference, 1/nat; ORPO's lambda, IPO's tau")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="assumed share of wrong labels")
    reference_free: bool = Field(False, description="take the reference's log-ratio as 0")
    rpo_alpha: float = Field(0.0, ge=0, description="weight of the chosen answer's likelihood per token; 0 = off")
    ld_alpha: float = Field(1.0, ge=0, le=1, description="weight of tokens beyond the shorter answer's length; 1 = off")
    wpo: bool = Field(False, description="weigh a pair by its answers' probability per token under the policy (WPO)")
    swap_consistency: float = Field(
        0.0, ge=0, description="weight of (difference of a verdict's margins in both orders)^2, 1/nat^2; 0 = off"
    )
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = Field(
        "reverse_kl", description="from the reference, that shapes the log-ratios; reverse_kl = plain DPO"
    )
    divergence_alpha: float = Field(0.5, ge=0, le=2, description="order of alpha: 1 = reverse_kl, 0 = forward_kl")
    simpo_gamma: float = Field(0.5, ge=0, description="SimPO's target margin, reward units (beta * nats per token)")
    discopop_tau: float = Field(0.05, gt=0, description="DiscoPOP's temperature between its two halves")
    dpop_lambda: float = Field(50.0, ge=0, description="DPOP's weight of a fall of the chosen answer's log-prob")
    rdpo_alpha: float = Field(
        0.01, ge=0, description="R-DPO's reward for length to be taken off, reward units per token"
    )


class LoraConfig(Section):
    """Low-rank adapters instead of full fine-tuning."""

    rank: int = Field(0, ge=0, description="rank of the adapters; 0 = full fine-tuning")
    alpha: float = Field(0.0, ge=0, description="the adapters are scaled by alpha / rank; 0 = alpha of 2 * rank")
    targets: list[str] = Field(["all-linear"], min_length=1, description="names of the adapted layers, or all-linear")
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    dora: bool = Field(False, description="also train a magnitude for every output (DoRA)")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the adapters' inputs set to 0, anew at every step from the second on"
    )


class MoeConfig(Section):
    """The routers of a mixture of experts."""

    aux_loss: float = Field(0.0, ge=0, description="weight of the load-balancing loss (router_aux_loss_coef); 0 = off")
    routes: Literal["compare", "replay", "off"] = Field(
        "compare", description="the reference's, stored: count the policy's that differ, train on them, or store none"
    )


class TrainConfig(Section):
    """The training loop and its optimizer (AdamW)."""

    epochs: int = Field(1, ge=1, description="passes over the training rows")
    max_steps: int = Field(0, ge=0, description="optimizer steps at most; 0 = as many as the epochs have")
    batch_pairs: int = Field(16, ge=1, description="pairs that an optimizer step has at least (whole rows are taken)")
    pair_weight: Literal["pair", "row"] = Field("pair", description="a pair weighs 1, or 1 / pairs of its row")
    lr: float = Field(5e-5, gt=0, description="peak learning rate")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="shape after the warm-up")
    num_cycles: float = Field(0.5, gt=0, description="waves of the cosine; 0.5 = half a wave, from the peak to the end")
    warmup_ratio: float = Field(0.1, ge=0, lt=1, description="share of the steps on which the rate rises from 0")
    min_lr_ratio: float = Field(0.0, ge=0, lt=1, description="rate at the end / peak rate")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay, per step times the rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's mean, per step")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the squared gradient's mean, per step")
    eps: float = Field(1e-8, gt=0, description="added to the root of the squared gradient's mean")
    clip_norm: float = Field(1.0, ge=0, description="largest gradient norm; 0 = no clipping")
    eval_every_steps: int = Field(0, ge=0, description="steps between validations; 0 = only at the end")
    n_evals: int = Field(0, ge=0, description="validations, evenly spaced, instead of eval_every_steps; 0 = off")
    checkpoint_every_steps: int = Field(0, ge=0, description="steps between two, one at the end; 0 = only at Ctrl-C")
    n_checkpoints: int = Field(
        0, ge=0, description="checkpoints, evenly spaced, all kept, instead of checkpoint_every_steps; 0 = off"
    )
    keep_checkpoints: int = Field(2, ge=1, description="newest checkpoints kept, besides the best weights")
    activation_checkpointing: bool = Field(False, description="recompute activations: less memory, a third more time")
    patience: int = Field(0, ge=0, description="validations without a better one that end the training; 0 = never")
    select: Literal["averaged_accuracy", "accuracy", "loss", "last"] = Field(
        "averaged_accuracy", description="validation figure that picks the weights to judge and export"
    )


class FsdpConfig(Section):
    """How torchrun's ranks share the model (FSDP2); of no effect on one process."""

    replicas: int = Field(1, ge=1, description="whole models, each cut over ranks / replicas (HSDP: one a node)")
    expert_units: int = Field(
        0, ge=0, description="parts in which a layer's experts are put together; 0 = so many that one is within 8 GiB"
    )
    offload: bool = Field(False, description="keep parameters and moments in the CPU's memory")


class ReferenceConfig(Section):
    """The reference policy and the store of its log-probs."""

    path: Place = Field(
        "", description='another model, as model.path, as the reference; "" = the policy before training'
    )
    store: Place = Field("", description='folder of the stored log-probs; "" = reference/ in run.cache')


class JudgeConfig(Section):
    """The judging of the held-out rows, before and after training."""

    sighted: bool = Field(True, description="the judge sees the request; false = only the two answers (blind)")
    rows: int = Field(0, ge=0, description="most test rows judged, whole groups drawn; 0 = all")
    pairs_per_row: int = Field(1, ge=0, description="the first N (chosen, rejected) pairs of a test row; 0 = all")
    blind_control: bool = Field(True, description="also judge blind, as one of the controls")
    sighted_control: bool = Field(False, description="what is trained blind is also judged sighted")
    rewards: Literal["off", "sum", "mean"] = Field(
        "off",
        description="also compare the answers' implicit rewards after training, log(pi/pi_ref), summed or a token, and "
        "their likelihoods log(pi) after and before it",
    )
    protocol: Literal["compare", "choose", "rate", "ties"] = Field(
        "compare", description="what dpo.judge asks: better of two, both orders; best of four; 1 to 10; that, on Ties"
    )
    template: Place = Field("", description='file of what the judge is asked, or a preset; "" = the protocol\'s own')
    reference_answer: bool = Field(True, description="the judge sees the reference answers of rows that have one")
    critique: Literal["off", "greedy", "sampled"] = Field(
        "off", description="a local model writes a critique before its verdict (section critiques)"
    )
    split: Literal["all", "test"] = Field(
        "all", description="rows that dpo.judge judges: all, or a training's test rows"
    )
    self_preference: bool = Field(
        False, description="also tell how often a local judge prefers the answer that its own model finds likelier"
    )
    attacks: list[str] = Field(
        [], description="also judge the rows with their wrong answers under each of these; all = each there is"
    )


class CritiquesConfig(Section):
    """What the judge writes before its verdict, with objective=critiques or judge.critique."""

    template: Place = Field("", description='as judge.template; "" = the preset PROTOCOL_critique')
    max_tokens: int = Field(256, ge=1, description="most tokens of a critique with its verdict")
    temperature: float = Field(0.8, gt=0, description="of what is sampled")
    top_p: float = Field(1.0, gt=0, le=1, description="of what is sampled: the fewest tokens of this mass")
    closing: str = Field(
        "", description='text put behind a critique without a verdict, which is then read there; "" = it has none'
    )
    batch: int = Field(64, ge=1, description="critiques written at once, whole rows; a kill loses so many")
    samples: int = Field(8, ge=2, description="critiques of each question that a round samples")
    kept: int = Field(2, ge=1, description="most right ones, and most wrong ones, of a question that are paired")
    rounds: int = Field(1, ge=1, description="of sampling and training; each samples from what the last one trained")
    verdict_share: float = Field(0.15, ge=0, lt=1, description="share of the pairs that are verdicts alone")


class EndpointConfig(Section):
    """A judge behind an OpenAI-compatible HTTP endpoint, for python -m dpo.judge."""

    url: str = Field("", description='e.g. https://api.openai.com/v1, http://localhost:8000/v1; "" = a local model')
    model: str = Field("", description="its name there")
    api_key_env: str = Field("OPENAI_API_KEY", min_length=1, description="environment variable that holds the key")
    concurrency: int = Field(32, ge=1, le=500, description="requests under way at once")
    timeout_s: float = Field(60.0, gt=0, description="longest wait for one answer, s")
    max_retries: int = Field(6, ge=0, description="tries after a first that failed, each twice as long after the last")
    max_tokens: int = Field(16, ge=1, description="most tokens of an answer, those of a thought included")
    temperature: float = Field(0.0, ge=0, description="of sampling; 0 = the likeliest token")
    top_logprobs: int = Field(20, ge=0, le=20, description="likeliest tokens to read verdicts from; 0 = from the text")
    extra: list[str] = Field(
        [], description="more of the request's fields, NAME=VALUE each; NAME=null leaves one out, e.g. temperature=null"
    )
    max_cost: float = Field(0.0, ge=0, description="most dollars for all answers of a run; 0 = no limit")
    prices: Place = Field("", description='TOML of dollars per million tokens, by model; "" = dpo/judge/prices.toml')


class StudyConfig(Section):
    """What python -m dpo.study compares the trained judges with."""

    endpoints: list[str] = Field(
        [],
        description="MODEL URL [KEY_VARIABLE] [NAME=VALUE ...] each, the latter as of endpoint.extra; unset keys: not",
    )


class LogConfig(Section):
    """Where the figures go besides the run folder."""

    wandb: Literal["off", "online", "offline"] = Field("off", description="log to Weights & Biases")
    project: str = Field("dpo-judges", min_length=1, description="project name there")
    plots: bool = Field(True, description="draw the plots of the report")


class RunConfig(Section):
    """Folders of runs and caches."""

    root: Place = Field("runs", min_length=1, description="runs go to ROOT/NAME/TIME-SEED")
    resume: Place = Field("", description="run folder to go on with, latest, or auto: what was begun, if not done")
    hang_s: float = Field(540.0, gt=0, description="seconds that one rank may keep others waiting; then all end")
    cache: Place = Field("", description='folder of imports and log-probs; "" = $DPO_CACHE or ~/.cache/dpo-judges')


class Config(Section):
    """All of it. `exp` is the bare name of the experiment, also where a path was given."""

    exp: str = Field(min_length=1, description="name of a file in experiments/ (without .toml), or a path to a .toml")
    objective: Literal["verdicts", "responses", "critiques"] = Field(
        "verdicts", description="train A/B verdicts, the answers, or the judge's own critiques"
    )
    seed: int = Field(0, ge=0, le=1_000_000_000, description="seed of rows, order, initial adapters and bootstrap")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda where there is a GPU")
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = Field("auto", description="auto = bf16 where native, else fp32")
    show: int = Field(0, ge=0, description="print the first N trees with their scored tokens")
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    checkable: CheckableConfig = CheckableConfig()
    pack: PackConfig = PackConfig()
    kernels: KernelsConfig = KernelsConfig()
    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    moe: MoeConfig = MoeConfig()
    train: TrainConfig = TrainConfig()
    fsdp: FsdpConfig = FsdpConfig()
    reference: ReferenceConfig = ReferenceConfig()
    judge: JudgeConfig = JudgeConfig()
    critiques: CritiquesConfig = CritiquesConfig()
    endpoint: EndpointConfig = EndpointConfig()
    study: StudyConfig = StudyConfig()
    log: LogConfig = LogConfig()
    run: RunConfig = RunConfig()


def config_dict(config: Config) -> dict[str, object]:
    """The configuration as plain JSON values; `Config(**...)` of it is equal to it."""
    return config.model_dump(mode="json")
