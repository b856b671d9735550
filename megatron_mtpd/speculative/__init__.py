"""Speculative decoding with the heads, and the benchmark that measures acceptance.

The arrows go down: `prompts`, `counts`, `cost`, `sampling` and `attention` stand alone; `state` holds what a batch
keeps between steps; `decoder` drafts and verifies; `generate` feeds it prompts; `loading` builds the model from a
checkpoint; `teacher_forced` measures without decoding; `benchmark` runs it all over a cluster, each replica as a
`worker` that keeps `results`; `summary` adds them up, `report` shows them; `speed` measures the decoder by itself.
"""
