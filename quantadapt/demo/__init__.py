"""A tiny pretrained model and an instruction data set, both built by scripts in this folder.

They let every command of the package run without a download. ``README.md`` beside this file
says where the text comes from, how the model was trained and how good it is.

This module holds paths only, so importing it is cheap.
"""

from pathlib import Path

DEMO_DIR = Path(__file__).resolve().parent

MODEL_DIR = DEMO_DIR / "model"
"""The pretrained Llama model with its tokenizer, in the transformers layout."""

TRAIN_FILE = DEMO_DIR / "train.jsonl"
"""Instruction records (instruction, input, output) to train on."""

EVAL_FILE = DEMO_DIR / "eval.jsonl"
"""Instruction records that share no function name and no operand pair with the training file."""

PREFERENCES = DEMO_DIR / "preferences"
"""Pairs of a right and a wrong answer to requests like those: train.jsonl and eval.jsonl."""

LABELLED = DEMO_DIR / "labelled"
"""Folders with labelled examples: `sequence`, requests with what they ask for, and `token`, words
of requests with what each is."""

TEXT_FILE = DEMO_DIR / "heldout.txt"
"""Plain text from source files the model has not seen: for perplexity and calibration."""

TRAIN_DEFAULTS = {
    "max_steps": 60,
    "learning_rate": 4e-3,
    "per_device_train_batch_size": 8,
}
"""What a run on the demo is trained with where the user says nothing (fields of TrainSpec)."""

TRAIN_OTHERS = {"learning_rate": 1e-3}
"""The same for objectives other than `sft`, which take smaller steps."""
