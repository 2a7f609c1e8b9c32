"""What clients may send: OpenAI's chat and completion requests, with the extra options of vLLM and FastDeploy.

Types are checked here and ranges in :class:`engine.sampling_params.SamplingParams`, so each rule stands in one place.
Fields that nobody here knows are ignored, as OpenAI does, and counted; those that would change the answer are refused
(:mod:`deployments.openai.requests.unsupported`). ``docs/api.md`` lists them all.
"""
