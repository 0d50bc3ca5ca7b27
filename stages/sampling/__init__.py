"""Sampling: from logits to tokens, as a function of the request alone, whatever else is in the batch.

Options act in the order of vLLM's v1 sampler (vllm/v1/sample/sampler.py and the logits processors it calls):

1. log-probabilities are taken from the model's own logits (vLLM's logprobs_mode raw_logprobs);
2. what `grammar` and `thought` allow, `allowed_token_ids`, `bad_words`, `min_tokens`, `logit_bias`, then the penalties
   change the logits, also where the choice is greedy; a grammar wins over the three after it;
3. a greedy choice ends here; else come `temperature`, `min_p`, `top_k`, `top_p`, and the draw: the best token by its
   log-probability and noise of its own, so that a draft and the token it is compared with mostly agree.

Equal logits rank by token id, where vLLM keeps all that equal the last of `top_k`. Rows are processed one by one in
numpy, which uses one thread: torch's sums over a vocabulary depend on the number of threads.
"""
