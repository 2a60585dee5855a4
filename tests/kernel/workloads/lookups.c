/* SPDX-License-Identifier: Apache-2.0 */
/* What engines have at the place where they look into their KV cache: a library of its own, loaded by lookups.py. */
#include <stdint.h>
#include <sys/sdt.h>

#define VISIBLE __attribute__((noinline, visibility("default")))

VISIBLE void look_up(const char *model, uint64_t hit_tokens, uint64_t looked_up_tokens)
{
	DTRACE_PROBE3(engine, look_up, model, hit_tokens, looked_up_tokens);
}

/* Numbers of 32 bits: what is in the upper halves of the registers is nobody's. */
VISIBLE void look_up_int(int looked_up_tokens, int hit_tokens, const char *model)
{
	DTRACE_PROBE3(engine, look_up_int, looked_up_tokens, hit_tokens, model);
}

/* The last three of the arguments that are passed in registers. */
VISIBLE void look_up_late(long a, long b, long c, uint64_t looked_up_tokens, const char *model, uint64_t hit_tokens)
{
	DTRACE_PROBE3(engine, look_up_late, looked_up_tokens, model, hit_tokens);
}

/* An engine with one model names none. */
VISIBLE void look_up_unnamed(uint64_t hit_tokens, uint64_t looked_up_tokens)
{
	DTRACE_PROBE2(engine, look_up_unnamed, hit_tokens, looked_up_tokens);
}
