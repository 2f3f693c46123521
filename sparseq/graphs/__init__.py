"""ONNX graphs of a Sparseq model: encoder, prefill and decode step with cache, in float32 and int8."""
