"""The science of CORE-Seg: data, model, evaluation. Knows nothing of Lightning or Gradio."""
