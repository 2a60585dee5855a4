// SPDX-License-Identifier: Apache-2.0
/* A library with two functions, one of them by two names, and a USDT probe with a semaphore. */
#define _SDT_HAS_SEMAPHORES 1
#include <sys/sdt.h>

#define EXPORTED __attribute__((visibility("default"), noinline))

__extension__ unsigned short places_here_semaphore __attribute__((section(".probes"))) = 0;

EXPORTED int places_first(int value)
{
	return value + 1;
}

EXPORTED int places_alias(int value) __attribute__((alias("places_first")));

/* Whether somebody is attached to the probe, which it passes. */
EXPORTED int places_second(int value)
{
	STAP_PROBE1(places, here, value);
	return places_here_semaphore;
}
