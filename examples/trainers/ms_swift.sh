#!/usr/bin/env bash
# the file itself is the plugin
plugin=$(python -c "from importlib.util import find_spec; print(find_spec('svpo_kernels').submodule_search_locations[0])")
swift rlhf --rlhf_type dpo --model Qwen/Qwen2.5-7B-Instruct --dataset data.jsonl \
    --external_plugins "$plugin/integrations/ms_swift.py" "$@"
