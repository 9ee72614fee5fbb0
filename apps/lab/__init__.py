"""The Gradio lab: inspect checkpoints side by side, their rewards and their rollouts.

`page` puts the tabs together; each tab is thin, and what it shows is computed by the pure functions of `views`.
"""
