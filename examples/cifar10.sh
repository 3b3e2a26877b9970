#!/usr/bin/env bash
# CIFAR-10 on two CPU cores: train a small ViT, grow it twice as wide, fine-tune, export, verify, and train the same
# bigger model from scratch for the compute that operator training and fine-tuning took. About half an hour.
#   examples/cifar10.sh IMAGES OUT      IMAGES holds train/CLASS/*.jpg and val/CLASS/*.jpg, 32 x 32
set -euo pipefail
images=$(realpath "$1") out=$2
mkdir -p "$out" && cd "$out"
recipe=(--data "$images" --batch-size 128 --scale-min 0.6 --color-jitter 0 --smoothing 0.1 --seed 0)
small=(--set embed_dim=64 --set depth=6 --set num_heads=1)
large=(--set embed_dim=128 --set depth=6 --set num_heads=2)
input=(--set img_size=32 --set patch_size=8)

growkit train deit_tiny "${input[@]}" "${small[@]}" "${recipe[@]}" --epochs 8 --lr 2e-3 --eval-every 4
growkit grow run/trained --to deit_tiny "${large[@]}" "${recipe[@]}" --steps 100
growkit finetune "${recipe[@]}" --epochs 4 --lr 1e-3
growkit export --onnx
growkit verify --data "$images"

steps=$(python -c '
from pathlib import Path
from growkit.demo import equal_compute
from growkit.record import RunFolder
print(equal_compute(RunFolder(Path("run"))))')
growkit train deit_tiny "${input[@]}" "${large[@]}" "${recipe[@]}" --steps "$steps" --lr 2e-3 --run from-scratch
