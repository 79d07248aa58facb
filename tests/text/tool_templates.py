"""Chat templates that call tools: in few words, what each family's own does with calls.

Tokens are those of `samples.SPECIALS`: <|im_start|>, <|im_end|>, <|header|>, </s>. What is peculiar
to a family is kept: how it tells a call ('tool_calls' in message, is defined, is not none, a true
value), what it does with content beside one, what types of arguments it takes, and the header.
"""

# The first user message holds the tools, one call a message, content beside a call is not shown.
LLAMA31 = """
{{- bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set system = '' %}
{%- if messages[0].role == 'system' %}
{%- set system = messages[0].content | trim %}{% set messages = messages[1:] %}
{%- endif %}
{{- '<|header|>system<|header|>\n\nToday Date: ' + DATE + '\n' + system + '<|im_end|>' }}
{%- if tools is not none %}
{{- '<|header|>user<|header|>\n\n' }}
{%- for t in tools %}{{ t | tojson(indent=4) }}{% endfor %}
{{- messages[0].content | trim + '<|im_end|>' }}{% set messages = messages[1:] %}
{%- endif %}
{%- for m in messages %}
{%- if not (m.role in ['ipython', 'tool'] or 'tool_calls' in m) %}
{{- '<|header|>' + m.role + '<|header|>\n\n' + m.content | trim + '<|im_end|>' }}
{%- elif 'tool_calls' in m %}
{%- if not m.tool_calls | length == 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '<|header|>assistant<|header|>\n\n' }}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{{- '</s>' if builtin_tools is defined else '<|im_end|>' }}
{%- else %}
{{- '<|header|>ipython<|header|>\n\n' + m.content | tojson + '<|im_end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|header|>assistant<|header|>\n\n' }}{% endif %}
"""
LLAMA32 = LLAMA31.replace("DATE", "strftime_now('%d %b %Y')")
LLAMA31 = LLAMA31.replace("DATE", "(date_string if date_string is defined else '26 Jul 2024')")

_RESULTS = """
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{{ opening }}{% endif %}
"""
# The newline after the header is written with the content or with each call.
QWEN25 = """
{%- set system = messages[0].content if messages[0].role == 'system' else 'Be good.' %}
{{- '<|im_start|>system\n' + system }}
{%- if tools %}{% for t in tools %}{{ '\n' + t | tojson }}{% endfor %}{% endif %}
{{- '<|im_end|>\n' }}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first)
       or (m.role == 'assistant' and not m.tool_calls) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>' + m.role }}
{%- if m.content %}{{ '\n' + m.content }}{% endif %}
{%- for c in m.tool_calls %}
{%- if c.function is defined %}{% set c = c.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' + c.name + '", "arguments": ' + c.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
""" + _RESULTS.replace("{{ opening }}", "")
# Calls beside no content only; a null list of calls is one that cannot be walked through.
HERMES = """
{{- bos_token }}
{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
{%- if m.role in ['user', 'system'] or (m.role == 'assistant' and m.tool_calls is not defined) %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}
{{- '<|im_start|>' + m.role }}
{%- for c in m.tool_calls %}
{%- if c.function is defined %}{% set c = c.function %}{% endif %}
{{- '\n<tool_call>\n{"name": "' + c.name + '", "arguments": ' + c.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
""" + _RESULTS.replace("{{ opening }}", "")
# Thoughts stay after the last question only, and may be switched off.
QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role in ['user', 'system'] %}
{{- '<|im_start|>' + m.role + '\n' + content + '<|im_end|>' + '\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<|im_start|>' + m.role + '\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}
{{- content.lstrip('\n') }}
{%- else %}
{{- '<|im_start|>' + m.role + '\n' + content }}
{%- endif %}
{%- for c in m.tool_calls or [] %}
{%- if (loop.first and content) or not loop.first %}{{ '\n' }}{% endif %}
{%- if c.function %}{% set c = c.function %}{% endif %}
{{- '<tool_call>\n{"name": "' + c.name + '", "arguments": ' }}
{{- c.arguments if c.arguments is string else c.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
""" + _RESULTS.replace(
    "{{ opening }}",
    "{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is defined and not enable_thinking }}",
)
# No header, a space before content only, identifiers of nine characters, no null list of calls.
MISTRAL = """
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if tools is not none and m == users[-1] %}{{ '[TOOLS]' + tools | tojson }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.tool_calls is defined %}
{{- '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}
{%- set out = c.function | tojson %}
{%- if not c.id is defined or c.id | length != 9 %}{{ raise_exception('nine') }}{% endif %}
{{- out[:-1] + ', "id": "' + c.id + '"}' + (', ' if not loop.last else '') }}
{%- endfor %}
{{- ']' + eos_token }}
{%- elif m.role == 'assistant' %}
{{- ' ' + m.content | trim + eos_token }}
{%- else %}
{{- '[RESULTS]' + m.content + '[/RESULTS]' }}
{%- endif %}
{%- endfor %}
"""
# Arguments are text; no header after results; an answer's prompt closes the thoughts.
DEEPSEEK31 = """
{{- bos_token }}
{%- set ns = namespace(asked=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.asked = true %}{{ '<|im_start|>' + m.content }}
{%- elif m.role == 'assistant' %}
{{- '<|header|></think>' if ns.asked }}{% set ns.asked = false %}
{%- if m.tool_calls is defined and m.tool_calls is not none %}
{{- m.content if m.content is not none }}
{%- for c in m.tool_calls %}
{{- '<call>' + c.function.name + '<sep>' + c.function.arguments + '</call>' }}
{%- endfor %}
{{- '</s>' }}
{%- else %}
{{- m.content.split('</think>')[-1] + '</s>' }}
{%- endif %}
{%- else %}{{ '<result>' + m.content + '</result>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and ns.asked %}
{{- '<|header|>' + ('<think>' if thinking else '</think>') }}
{%- endif %}
"""
# Content that is not null comes after the calls, as a turn of its own.
DEEPSEEK_R1 = """
{{- bos_token }}
{%- set ns = namespace(tool=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.tool = false %}{{ '<|im_start|>' + m.content }}{% endif %}
{%- if m.role == 'assistant' and m.tool_calls %}
{%- set ns.tool = false %}
{%- for c in m.tool_calls %}
{{- '<|header|><call>' if loop.first else '\n<call>' }}
{{- c.type + '<sep>' + c.function.name + '\n```json\n' + c.function.arguments + '\n```</call>' }}
{%- endfor %}
{{- '</s>' }}
{%- endif %}
{%- if m.role == 'assistant' and m.content is not none %}
{{- '<|header|>' if not ns.tool }}{% set ns.tool = false %}
{{- m.content.split('</think>')[-1] + '</s>' }}
{%- endif %}
{%- if m.role == 'tool' %}{% set ns.tool = true %}
{{- '<result>' + m.content + '</result>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.tool %}{{ '<|header|><think>\n' }}{% endif %}
"""
