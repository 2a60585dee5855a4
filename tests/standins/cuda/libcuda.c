// SPDX-License-Identifier: Apache-2.0
/*
 * A stand-in for libcuda.so.1: the exported names, the arguments and the results of the driver's functions, and no GPU.
 *
 * Device memory is host memory, a kernel does nothing, and a stream is done as long after it is waited for as
 * standin_busy_us() says. Some functions call others by their exported names: a driver may.
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
typedef struct stream *CUstream;

enum { SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, LAUNCH_FAILED = 719 };

#define EXPORTED __attribute__((visibility("default"), noinline))

static CUresult failing;
static long busy_us;
static void (*hook)(void);

/* ---- what a test sets ---- */

/* Until 0 is set, every function that is called from outside fails with this. */
EXPORTED void standin_fail(CUresult result)
{
	failing = result;
}

EXPORTED void standin_busy_us(long us)
{
	busy_us = us;
}

/* Is called in each wait. */
EXPORTED void standin_hook(void (*wanted)(void))
{
	hook = wanted;
}

static CUresult wait_for_gpu(void)
{
	struct timespec rest = { .tv_sec = busy_us / 1000000, .tv_nsec = busy_us % 1000000 * 1000 };

	if (hook)
		hook();
	if (busy_us)
		while (clock_nanosleep(CLOCK_MONOTONIC, 0, &rest, &rest))
			;
	return failing;
}

/* ---- the driver ---- */

EXPORTED CUresult cuInit(unsigned int flags)
{
	return failing;
}

#define LAUNCH_PARAMETERS                                                                                     \
	(void *function, unsigned int gx, unsigned int gy, unsigned int gz, unsigned int bx, unsigned int by, \
	 unsigned int bz, unsigned int shared, CUstream stream, void **parameters, void **extra)

EXPORTED CUresult cuLaunchKernel LAUNCH_PARAMETERS
{
	return failing;
}

EXPORTED CUresult cuLaunchKernel_ptsz LAUNCH_PARAMETERS
{
	return failing;
}

/* This one calls another. The assignment keeps the compiler from making it a jump. */
EXPORTED CUresult cuLaunchKernelEx(const void *config, void *function, void **parameters, void **extra)
{
	volatile CUresult result = cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, NULL, parameters, extra);

	return result;
}

EXPORTED CUresult cuGraphLaunch(void *graph, CUstream stream)
{
	return failing;
}

EXPORTED CUresult cuCtxSynchronize(void)
{
	volatile CUresult result = wait_for_gpu();

	return result;
}

EXPORTED CUresult cuStreamSynchronize(CUstream stream)
{
	volatile CUresult result = wait_for_gpu();

	return result;
}

EXPORTED CUresult cuEventSynchronize(void *event)
{
	volatile CUresult result = wait_for_gpu();

	return result;
}

#define COPY(name)                                                                              \
	EXPORTED CUresult name(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) \
	{                                                                                       \
		if (!failing)                                                                   \
			memcpy((void *)to, (void *)from, bytes);                                \
		return failing;                                                                 \
	}

COPY(cuMemcpyAsync)
COPY(cuMemcpyHtoDAsync_v2)
COPY(cuMemcpyDtoHAsync_v2)
COPY(cuMemcpyDtoDAsync_v2)

/* A copy that waits is a copy that does not, and a wait. */
#define WAITING_COPY(name, asynchronous)                                        \
	EXPORTED CUresult name(CUdeviceptr to, CUdeviceptr from, size_t bytes)  \
	{                                                                       \
		volatile CUresult result = asynchronous(to, from, bytes, NULL); \
                                                                                \
		if (!result)                                                    \
			result = cuStreamSynchronize(NULL);                     \
		return result;                                                  \
	}

WAITING_COPY(cuMemcpy, cuMemcpyAsync)
WAITING_COPY(cuMemcpyHtoD_v2, cuMemcpyHtoDAsync_v2)
WAITING_COPY(cuMemcpyDtoH_v2, cuMemcpyDtoHAsync_v2)
WAITING_COPY(cuMemcpyDtoD_v2, cuMemcpyDtoDAsync_v2)

static CUresult allocate(CUdeviceptr *address, size_t bytes)
{
	if (failing)
		return failing;
	*address = (CUdeviceptr)malloc(bytes);
	return *address ? SUCCESS : OUT_OF_MEMORY;
}

EXPORTED CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes)
{
	volatile CUresult result = allocate(address, bytes);

	return result;
}

EXPORTED CUresult cuMemAllocManaged(CUdeviceptr *address, size_t bytes, unsigned int flags)
{
	volatile CUresult result = allocate(address, bytes);

	return result;
}

EXPORTED CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream stream)
{
	volatile CUresult result = allocate(address, bytes);

	return result;
}

static CUresult release(CUdeviceptr address)
{
	if (failing)
		return failing;
	free((void *)address);
	return SUCCESS;
}

EXPORTED CUresult cuMemFree_v2(CUdeviceptr address)
{
	volatile CUresult result = release(address);

	return result;
}

EXPORTED CUresult cuMemFreeAsync(CUdeviceptr address, CUstream stream)
{
	volatile CUresult result = release(address);

	return result;
}
