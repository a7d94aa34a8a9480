#!/bin/sh
# A language model that recalls what it just heard, and the studies of what makes a memory recall more;
# docs/recall.md says what came out so far. Wants a GPU, the voices that tiny_bundle.sh names and its
# codec in $BUILD/tiny (or that of assets/tiny). What is there is kept.
#
#   sh scripts/bundle/recall.sh data
#   sh scripts/bundle/recall.sh base                                  # DRILL_STEPS=10 MIX_STEPS=10 shortens
#   sh scripts/bundle/recall.sh study configs/study/projections.yaml  # more flags of recall_study.py follow
#
# `study` chooses on heldout; VAL=$BUILD/final for numbers to report.
set -eu
BUILD=${BUILD:-build}
TRAIN_HOURS=${TRAIN_HOURS:-60}
FAR_HOURS=${FAR_HOURS:-14}
HELDOUT_HOURS=${HELDOUT_HOURS:-4}
FINAL_HOURS=${FINAL_HOURS:-4}
DRILL_HOURS=${DRILL_HOURS:-200}
FAR_TEXT_HOURS=${FAR_TEXT_HOURS:-300}
DRILL_STEPS=${DRILL_STEPS:-13000}
MIX_STEPS=${MIX_STEPS:-8000}
VAL=${VAL:-$BUILD/heldout}
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/../.."

speech() { # SPLIT SEED HOURS SHORTEST LONGEST: $BUILD/SPLIT, encoded
    $PYTHON scripts/bundle/make_conversations.py "$BUILD/speech/$1" --split "$1" --seed "$2" --hours "$3" \
        --minutes "$4" "$5"
    $PYTHON scripts/encode_manifest.py "$BUILD/speech/$1/manifest.jsonl" "$BUILD/$1" --model "$BUILD/tiny" \
        --with_words
}

data() {
    [ -f "$BUILD/tiny/tokenizer.model" ] || $PYTHON scripts/bundle/make_tiny.py begin "$BUILD/tiny"
    speech train 0 "$TRAIN_HOURS" 4 10
    speech far 0 "$FAR_HOURS" 5 10
    # 6 minutes at most: that is as far as a probe's gap and the evaluation go
    speech heldout 1 "$HELDOUT_HOURS" 4 6
    speech final 1 "$FINAL_HOURS" 4 6
    # with_text.jsonl of train: its speech and the drills; of far: its speech and more of the same as text
    $PYTHON scripts/bundle/make_text.py "$BUILD/train/manifest.jsonl" --split drill --hours "$DRILL_HOURS" \
        --minutes 4 10 --model "$BUILD/tiny"
    $PYTHON scripts/bundle/make_text.py "$BUILD/far/manifest.jsonl" --split far --hours "$FAR_TEXT_HOURS" \
        --minutes 4 10 --model "$BUILD/tiny"
    grep text- "$BUILD/train/with_text.jsonl" >"$BUILD/train/text.jsonl"
}

fit() { # MANIFEST STEPS: go on from $BUILD/tiny, and leave the weights there
    $PYTHON train/fit.py --config tiny_base.yaml --model.source "$BUILD/tiny" --data.manifest "$1" \
        --data.val_manifest "$BUILD/heldout/manifest.jsonl" --run_dir "$BUILD/lm" \
        --model.loss.text_padding_weight 0.1 --trainer.max_epochs -1 --trainer.max_steps "$2"
    $PYTHON scripts/bundle/make_tiny.py finish "$BUILD/tiny" \
        --trained "$(ls -d "$BUILD"/lm/[0-9]* | tail -n 1)/checkpoints/last.safetensors"
}

case ${1:-} in
data) data ;;
base)
    fit "$BUILD/train/text.jsonl" "$DRILL_STEPS" # recall sets in on text, 22 to 31 updates a second
    fit "$BUILD/train/with_text.jsonl" "$MIX_STEPS"
    ;;
study)
    study=$2
    shift 2
    $PYTHON scripts/recall_study.py --study "$study" \
        --out "$BUILD/study/$(basename "$study" .yaml)" --model.source "$BUILD/tiny" \
        --model.train memory --model.context_steps 188 \
        --model.memory.rule gated_delta --model.memory.layers every:1 --model.memory.projections attention \
        --model.memory.gate_init 0.1 --model.memory.write_gate 0.1 \
        --model.memory.forgetting_time_steps '[300,20000]' \
        --model.loss.magnitude_reg 0 --model.loss.text_padding_weight 0.1 \
        --model.optim.lr_memory 2e-3 --model.optim.lr_gates 1e-2 \
        --data.manifest "$BUILD/far/with_text.jsonl" --data.val_manifest "$VAL/manifest.jsonl" \
        --data.duration_sec 120 --data.batch_size 32 "$@"
    ;;
*)
    echo "usage: sh scripts/bundle/recall.sh data | base | study YAML [FLAGS OF recall_study.py]" >&2
    exit 2
    ;;
esac
