"""From a manifest of stereo recordings to codes that a language model can be trained on.

`manifest`, `alignments` and `probes` check what the user wrote, `audio` and `codes` turn sound into
codes (once: `cache`, or `codes_file` in place of the audio), `text` lays the words over the steps,
`windows` cuts and deals the clips, `lanes` in the order of their recordings. `encode` writes a
manifest anew as codes files.
"""

from moshi_ttt.data.codes_file import CodesFormat
from moshi_ttt.data.lanes import LaneLoader
from moshi_ttt.data.manifest import ManifestCheck, ManifestEntry, check_manifest, read_manifest
from moshi_ttt.data.probes import Probe, RecallClass
from moshi_ttt.data.recordings import EncodedRecording, RecordingReader, read_recordings
from moshi_ttt.data.windows import WindowLoader

__all__ = [
    "CodesFormat",
    "EncodedRecording",
    "LaneLoader",
    "ManifestCheck",
    "ManifestEntry",
    "Probe",
    "RecallClass",
    "RecordingReader",
    "WindowLoader",
    "check_manifest",
    "read_manifest",
    "read_recordings",
]
