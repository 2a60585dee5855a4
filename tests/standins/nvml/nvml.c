/*
 * A libnvidia-ml.so.1 that says what a script tells it to, with NVML's own ABI: names, structures and their versions,
 * error codes. Written from NVIDIA's public documentation of NVML; no line of nvml.h is in here.
 *
 * The script is the file PATH-OF-THIS-LIBRARY.script, read again at every call. One statement a line, `#` comments:
 *
 *   kernel VERSION                  the kernel module's version; other than when this library was loaded: error 18
 *   count N                         how many GPUs there are
 *   fail DEVICE CALL CODE [AFTER]   CALL (or *) about DEVICE (or *) fails, once AFTER calls were made in all
 *   delay DEVICE CALL MILLISECONDS
 *   event NUMBER DEVICE XID         an XID error; told to event sets that were made before the line was there
 *   DEVICE CALL VALUES...           what CALL answers
 *
 * DEVICE is a GPU's index, `-` for calls about none, or GPU.INSTANCE for a MIG device. CALL is the function's name,
 * with a colon and the argument where it has one: nvmlDeviceGetClockInfo:0. A call without a line is not supported.
 * Where there is a file PATH-OF-THIS-LIBRARY.calls, each call is appended to it: DEVICE CALL.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum {
	SUCCESS = 0,
	UNINITIALIZED = 1,
	INVALID_ARGUMENT = 2,
	NOT_SUPPORTED = 3,
	NOT_FOUND = 6,
	INSUFFICIENT_SIZE = 7,
	TIMEOUT = 10,
	LIB_RM_VERSION_MISMATCH = 18,
	ARGUMENT_VERSION_MISMATCH = 25,
};

#define MAX_GPUS 16
#define MAX_INSTANCES 8
#define LINE 4096
#define VERSIONED(type, version) ((unsigned int)sizeof(type) | (version) << 24)

typedef unsigned long long u64;

struct device {
	char name[16];
};

struct event_set {
	u64 heard; /* the number of the last event that was told, or that was there before the set */
	unsigned int registered; /* a bit for each GPU */
};

struct gpm_sample {
	int taken;
	u64 number;
	char device[16];
};

struct utilization {
	unsigned int gpu;
	unsigned int memory;
};

struct memory_v2 {
	unsigned int version;
	u64 total;
	u64 reserved;
	u64 free;
	u64 used;
};

struct temperature_v1 {
	unsigned int version;
	unsigned int sensor;
	int temperature;
};

struct violation_time {
	u64 reference_us;
	u64 violation_ns;
};

struct field_value {
	unsigned int field;
	unsigned int scope;
	long long timestamp;
	long long latency_us;
	unsigned int type;
	unsigned int result;
	union {
		double real;
		unsigned int u32;
		u64 u64;
		int i32;
	} value;
};

struct process_info {
	unsigned int pid;
	u64 used_bytes;
	unsigned int gpu_instance;
	unsigned int compute_instance;
};

struct process_sample {
	unsigned int pid;
	u64 timestamp_us;
	unsigned int sm;
	unsigned int memory;
	unsigned int encoder;
	unsigned int decoder;
};

struct event_data {
	struct device *device;
	u64 type;
	u64 data;
	unsigned int gpu_instance;
	unsigned int compute_instance;
};

struct attributes {
	unsigned int multiprocessors;
	unsigned int shared[5];
	unsigned int gpu_slices;
	unsigned int compute_slices;
	u64 memory_mb;
};

struct gpm_metric {
	unsigned int id;
	unsigned int result;
	double value;
	const char *names[3];
};

struct gpm_metrics_get {
	unsigned int version;
	unsigned int count;
	struct gpm_sample *older;
	struct gpm_sample *newer;
	struct gpm_metric metrics[];
};

struct gpm_support {
	unsigned int version;
	unsigned int supported;
};

_Static_assert(sizeof(struct memory_v2) == 40, "nvmlMemory_v2_t");
_Static_assert(sizeof(struct temperature_v1) == 12, "nvmlTemperature_v1_t");
_Static_assert(sizeof(struct field_value) == 40, "nvmlFieldValue_t");
_Static_assert(sizeof(struct process_info) == 24, "nvmlProcessInfo_t");
_Static_assert(sizeof(struct process_sample) == 32, "nvmlProcessUtilizationSample_t");
_Static_assert(sizeof(struct event_data) == 32, "nvmlEventData_t");
_Static_assert(sizeof(struct attributes) == 40, "nvmlDeviceAttributes_t");
_Static_assert(sizeof(struct gpm_metric) == 40, "nvmlGpmMetric_t");

static struct device gpus[MAX_GPUS];
static struct device instances[MAX_GPUS][MAX_INSTANCES];
static char path[LINE];
static char loaded_version[64];
static int initialised;
static u64 calls;
static int samples_out, sets_out;

/* How many samples and event sets were made and not given back; tests read them. */
int standin_samples(void)
{
	return samples_out;
}

int standin_sets(void)
{
	return sets_out;
}

static FILE *open_script(void)
{
	char name[LINE + 16];

	snprintf(name, sizeof(name), "%s.script", path);
	return fopen(name, "re");
}

/* What follows `first second` on its line, or 0. */
static int find(const char *first, const char *second, char *rest)
{
	char line[LINE], a[64], b[256];
	FILE *script = open_script();
	int found = 0, at = 0;

	if (!script)
		return 0;
	while (!found && fgets(line, sizeof(line), script)) {
		if (sscanf(line, "%63s %255s %n", a, b, &at) < 2 || a[0] == '#')
			continue;
		if (!strcmp(a, first) && (!second || !strcmp(b, second))) {
			snprintf(rest, LINE, "%s", second ? line + at : b);
			rest[strcspn(rest, "\n")] = 0;
			found = 1;
		}
	}
	fclose(script);
	return found;
}

static int matches(const char *pattern, const char *word, const char *whole)
{
	return !strcmp(pattern, "*") || !strcmp(pattern, word) || !strcmp(pattern, whole);
}

/* The error that the script wants of this call; waits as long as it says. */
static int scripted(const char *device, const char *function, const char *whole)
{
	char line[LINE], verb[16], of[16], name[256];
	FILE *script = open_script();
	int error = SUCCESS;

	if (!script)
		return SUCCESS;
	while (fgets(line, sizeof(line), script)) {
		u64 number = 0, after = 0;

		if (sscanf(line, "%15s %15s %255s %llu %llu", verb, of, name, &number, &after) < 4)
			continue;
		if (!matches(of, device, device) || !matches(name, function, whole))
			continue;
		if (!strcmp(verb, "fail") && calls > after && !error)
			error = (int)number;
		if (!strcmp(verb, "delay")) {
			struct timespec time = { .tv_sec = number / 1000, .tv_nsec = number % 1000 * 1000000 };

			nanosleep(&time, NULL);
		}
	}
	fclose(script);
	return error;
}

static void note(const char *device, const char *whole)
{
	char name[LINE + 16], line[512];
	int file, size;

	snprintf(name, sizeof(name), "%s.calls", path);
	file = open(name, O_WRONLY | O_APPEND | O_CLOEXEC);
	if (file < 0)
		return;
	size = snprintf(line, sizeof(line), "%s %s\n", device, whole);
	if (write(file, line, size) != size)
		abort();
	close(file);
}

/* The kernel module's version now. */
static void kernel_version(char *version)
{
	char rest[LINE] = "";

	find("kernel", NULL, rest);
	snprintf(version, sizeof(loaded_version), "%.63s", rest);
}

/* All that is alike in all calls: counting, waiting, scripted errors, what the driver's state makes of them. */
static int enter(const char *device, const char *function, const char *whole)
{
	char now[64];
	int error;

	calls++;
	note(device, whole);
	error = scripted(device, function, whole);
	if (error)
		return error;
	kernel_version(now);
	if (strcmp(now, loaded_version))
		return LIB_RM_VERSION_MISMATCH;
	if (!initialised && strcmp(function, "nvmlInitWithFlags"))
		return UNINITIALIZED;
	return SUCCESS;
}

/* Asks the script; `argument` is -1 where the function has none. */
static int ask(const struct device *device, const char *function, long long argument, char *rest)
{
	char whole[256];
	int error;

	if (!device)
		return INVALID_ARGUMENT;
	if (argument < 0)
		snprintf(whole, sizeof(whole), "%s", function);
	else
		snprintf(whole, sizeof(whole), "%s:%lld", function, argument);
	error = enter(device->name, function, whole);
	if (error)
		return error;
	return find(device->name, whole, rest) ? SUCCESS : NOT_SUPPORTED;
}

/* Takes up to `wanted` numbers from `rest`, which may be `hex`, negative or too large for less than 64 bits. */
static int numbers(const char *rest, u64 *values, int wanted)
{
	int count = 0;
	char *end;

	while (count < wanted) {
		values[count] = strtoull(rest, &end, 0);
		if (end == rest)
			break;
		rest = end;
		count++;
	}
	return count;
}

static int ask_numbers(const struct device *device, const char *function, long long argument, u64 *values, int wanted)
{
	char rest[LINE];
	int error = ask(device, function, argument, rest);

	if (error)
		return error;
	return numbers(rest, values, wanted) == wanted ? SUCCESS : NOT_SUPPORTED;
}

static int ask_number(const struct device *device, const char *function, long long argument, unsigned int *value)
{
	u64 wide = 0;
	int error = ask_numbers(device, function, argument, &wide, 1);

	if (!error)
		*value = (unsigned int)wide;
	return error;
}

static int ask_text(const struct device *device, const char *function, char *text, unsigned int size)
{
	char rest[LINE];
	int error = ask(device, function, -1, rest);

	if (error)
		return error;
	if (strlen(rest) >= size)
		return INSUFFICIENT_SIZE;
	strcpy(text, rest);
	return SUCCESS;
}

static const struct device none = { .name = "-" };

__attribute__((constructor)) static void loaded(void)
{
	Dl_info info;

	if (!dladdr((void *)loaded, &info))
		abort();
	snprintf(path, sizeof(path), "%s", info.dli_fname);
	kernel_version(loaded_version);
	for (int gpu = 0; gpu < MAX_GPUS; gpu++) {
		snprintf(gpus[gpu].name, sizeof(gpus[gpu].name), "%d", gpu);
		for (int instance = 0; instance < MAX_INSTANCES; instance++)
			snprintf(instances[gpu][instance].name, sizeof(instances[gpu][instance].name), "%d.%d", gpu,
				 instance);
	}
}

int nvmlInitWithFlags(unsigned int flags)
{
	int error = enter("-", "nvmlInitWithFlags", "nvmlInitWithFlags");

	(void)flags;
	if (!error)
		initialised++;
	return error;
}

int nvmlShutdown(void)
{
	int error = enter("-", "nvmlShutdown", "nvmlShutdown");

	/* Also where the script fails it: what counts is that nobody uses the library any more. */
	if (!initialised)
		return UNINITIALIZED;
	initialised--;
	return error;
}

const char *nvmlErrorString(int error)
{
	(void)error;
	return "an error of the stand-in";
}

int nvmlSystemGetDriverVersion(char *version, unsigned int size)
{
	return ask_text(&none, "nvmlSystemGetDriverVersion", version, size);
}

static int gpu_count(unsigned int *count)
{
	char rest[LINE];

	if (!find("count", NULL, rest))
		return NOT_SUPPORTED;
	*count = (unsigned int)atoi(rest);
	return SUCCESS;
}

int nvmlDeviceGetCount_v2(unsigned int *count)
{
	int error = enter("-", "nvmlDeviceGetCount_v2", "nvmlDeviceGetCount_v2");

	return error ? error : gpu_count(count);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned int index, struct device **device)
{
	unsigned int count = 0;
	int error;

	if (index >= MAX_GPUS)
		return INVALID_ARGUMENT;
	error = enter(gpus[index].name, "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetHandleByIndex_v2");
	if (error)
		return error;
	if (gpu_count(&count) || index >= count)
		return INVALID_ARGUMENT;
	*device = &gpus[index];
	return SUCCESS;
}

int nvmlDeviceGetUUID(struct device *device, char *uuid, unsigned int size)
{
	return ask_text(device, "nvmlDeviceGetUUID", uuid, size);
}

int nvmlDeviceGetName(struct device *device, char *name, unsigned int size)
{
	return ask_text(device, "nvmlDeviceGetName", name, size);
}

int nvmlDeviceGetUtilizationRates(struct device *device, struct utilization *rates)
{
	u64 values[2];
	int error = ask_numbers(device, "nvmlDeviceGetUtilizationRates", -1, values, 2);

	if (!error)
		*rates = (struct utilization){ .gpu = values[0], .memory = values[1] };
	return error;
}

/* The script has total, reserved, free and used. */
int nvmlDeviceGetMemoryInfo_v2(struct device *device, struct memory_v2 *memory)
{
	u64 values[4];
	int error;

	if (memory->version != VERSIONED(struct memory_v2, 2))
		return ARGUMENT_VERSION_MISMATCH;
	error = ask_numbers(device, "nvmlDeviceGetMemoryInfo_v2", -1, values, 4);
	if (!error) {
		memory->total = values[0];
		memory->reserved = values[1];
		memory->free = values[2];
		memory->used = values[3];
	}
	return error;
}

#define NUMBER(function)                                         \
	int function(struct device *device, unsigned int *value) \
	{                                                        \
		return ask_number(device, #function, -1, value); \
	}

#define NUMBER_OF(function)                                                             \
	int function(struct device *device, unsigned int argument, unsigned int *value) \
	{                                                                               \
		return ask_number(device, #function, argument, value);                  \
	}

#define WIDE(function)                                               \
	int function(struct device *device, u64 *value)              \
	{                                                            \
		return ask_numbers(device, #function, -1, value, 1); \
	}

NUMBER(nvmlDeviceGetPowerUsage)
NUMBER(nvmlDeviceGetEnforcedPowerLimit)
NUMBER(nvmlDeviceGetPcieReplayCounter)
NUMBER(nvmlDeviceGetMaxMigDeviceCount)
NUMBER(nvmlDeviceGetGpuInstanceId)
NUMBER_OF(nvmlDeviceGetTemperature)
NUMBER_OF(nvmlDeviceGetClockInfo)
WIDE(nvmlDeviceGetTotalEnergyConsumption)
WIDE(nvmlDeviceGetCurrentClocksEventReasons)
WIDE(nvmlDeviceGetCurrentClocksThrottleReasons)
WIDE(nvmlDeviceGetSupportedClocksEventReasons)
WIDE(nvmlDeviceGetSupportedClocksThrottleReasons)

int nvmlDeviceGetTemperatureV(struct device *device, struct temperature_v1 *temperature)
{
	unsigned int value = 0;
	int error;

	if (temperature->version != VERSIONED(struct temperature_v1, 1))
		return ARGUMENT_VERSION_MISMATCH;
	error = ask_number(device, "nvmlDeviceGetTemperatureV", temperature->sensor, &value);
	if (!error)
		temperature->temperature = (int)value;
	return error;
}

int nvmlDeviceGetViolationStatus(struct device *device, unsigned int policy, struct violation_time *time)
{
	u64 values[2];
	int error = ask_numbers(device, "nvmlDeviceGetViolationStatus", policy, values, 2);

	if (!error)
		*time = (struct violation_time){ .reference_us = values[0], .violation_ns = values[1] };
	return error;
}

/* In the script the two arguments are one: ten times the first, and the second. */
int nvmlDeviceGetTotalEccErrors(struct device *device, unsigned int type, unsigned int counter, u64 *count)
{
	return ask_numbers(device, "nvmlDeviceGetTotalEccErrors", type * 10 + counter, count, 1);
}

int nvmlDeviceGetRemappedRows(struct device *device, unsigned int *correctable, unsigned int *uncorrectable,
			      unsigned int *pending, unsigned int *failure)
{
	u64 values[4];
	int error = ask_numbers(device, "nvmlDeviceGetRemappedRows", -1, values, 4);

	if (!error) {
		*correctable = values[0];
		*uncorrectable = values[1];
		*pending = values[2];
		*failure = values[3];
	}
	return error;
}

/* The script has `field:NUMBER:SCOPE TYPE VALUE`, or `field:NUMBER:SCOPE error CODE`. */
int nvmlDeviceGetFieldValues(struct device *device, int count, struct field_value *values)
{
	int error;

	if (!device)
		return INVALID_ARGUMENT;
	error = enter(device->name, "nvmlDeviceGetFieldValues", "nvmlDeviceGetFieldValues");
	for (int i = 0; !error && i < count; i++) {
		char key[64], rest[LINE], type[16];
		u64 value = 0;
		int at = 0;

		snprintf(key, sizeof(key), "field:%u:%u", values[i].field, values[i].scope);
		values[i].value.u64 = 0;
		values[i].result = scripted(device->name, "field", key);
		if (values[i].result)
			continue;
		values[i].result = NOT_SUPPORTED;
		if (!find(device->name, key, rest) || sscanf(rest, "%15s %n", type, &at) < 1)
			continue;
		if (!strcmp(type, "double")) {
			values[i].type = 0;
			values[i].value.real = strtod(rest + at, NULL);
			values[i].result = SUCCESS;
			continue;
		}
		if (numbers(rest + at, &value, 1) != 1)
			continue;
		values[i].result = SUCCESS;
		if (!strcmp(type, "error")) {
			values[i].result = (unsigned int)value;
		} else if (!strcmp(type, "uint")) {
			values[i].type = 1;
			values[i].value.u32 = (unsigned int)value;
		} else if (!strcmp(type, "int")) {
			values[i].type = 5;
			values[i].value.i32 = (int)value;
		} else if (!strcmp(type, "wide")) {
			values[i].type = 3;
			values[i].value.u64 = value;
		} else {
			values[i].type = 77; /* a type that nobody knows */
		}
	}
	return error;
}

/* The script has `PID:BYTES` for each process. */
static int processes(const struct device *device, const char *function, unsigned int *count, struct process_info *infos)
{
	char rest[LINE], *word, *state;
	unsigned int found = 0, room = *count;
	int error = ask(device, function, -1, rest);

	if (error)
		return error;
	for (word = strtok_r(rest, " ", &state); word; word = strtok_r(NULL, " ", &state)) {
		char *colon = strchr(word, ':');

		if (!colon)
			return INVALID_ARGUMENT;
		if (infos && found < room)
			infos[found] = (struct process_info){ .pid = (unsigned int)strtoul(word, NULL, 0),
							      .used_bytes = strtoull(colon + 1, NULL, 0),
							      .gpu_instance = -1,
							      .compute_instance = -1 };
		found++;
	}
	*count = found;
	return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(struct device *device, unsigned int *count, struct process_info *infos)
{
	return processes(device, "nvmlDeviceGetComputeRunningProcesses_v3", count, infos);
}

int nvmlDeviceGetMPSComputeRunningProcesses_v3(struct device *device, unsigned int *count, struct process_info *infos)
{
	return processes(device, "nvmlDeviceGetMPSComputeRunningProcesses_v3", count, infos);
}

/* The script has `PID:MICROSECONDS:SM` for each sample; those after `since` count, and those of no time, as in drivers. */
int nvmlDeviceGetProcessUtilization(struct device *device, struct process_sample *samples, unsigned int *count,
				    u64 since)
{
	char rest[LINE], *word, *state;
	unsigned int found = 0, room = *count;
	int error = ask(device, "nvmlDeviceGetProcessUtilization", -1, rest);

	if (error)
		return error;
	for (word = strtok_r(rest, " ", &state); word; word = strtok_r(NULL, " ", &state)) {
		struct process_sample sample = {};

		if (sscanf(word, "%u:%llu:%u", &sample.pid, &sample.timestamp_us, &sample.sm) != 3)
			return INVALID_ARGUMENT;
		if (sample.timestamp_us && sample.timestamp_us <= since)
			continue;
		if (samples && found < room)
			samples[found] = sample;
		found++;
	}
	if (!found)
		return NOT_FOUND;
	*count = found;
	return found > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlEventSetCreate(struct event_set **set)
{
	int error = enter("-", "nvmlEventSetCreate", "nvmlEventSetCreate");
	char line[LINE];
	FILE *script;
	u64 number;

	if (error)
		return error;
	*set = calloc(1, sizeof(**set));
	sets_out++;
	script = open_script();
	while (script && fgets(line, sizeof(line), script))
		if (sscanf(line, "event %llu", &number) == 1 && number > (*set)->heard)
			(*set)->heard = number;
	if (script)
		fclose(script);
	return SUCCESS;
}

int nvmlEventSetFree(struct event_set *set)
{
	sets_out--;
	free(set);
	return enter("-", "nvmlEventSetFree", "nvmlEventSetFree");
}

int nvmlDeviceRegisterEvents(struct device *device, u64 types, struct event_set *set)
{
	int error;

	if (!device || types != 8)
		return INVALID_ARGUMENT;
	error = enter(device->name, "nvmlDeviceRegisterEvents", "nvmlDeviceRegisterEvents");
	if (!error)
		set->registered |= 1U << (device - gpus);
	return error;
}

int nvmlEventSetWait_v2(struct event_set *set, struct event_data *data, unsigned int timeout_ms)
{
	int error = enter("-", "nvmlEventSetWait_v2", "nvmlEventSetWait_v2");
	char line[LINE];
	FILE *script;
	u64 number, xid;
	unsigned int gpu;

	(void)timeout_ms;
	if (error)
		return error;
	script = open_script();
	error = TIMEOUT;
	while (script && error && fgets(line, sizeof(line), script)) {
		if (sscanf(line, "event %llu %u %llu", &number, &gpu, &xid) != 3 || number <= set->heard ||
		    gpu >= MAX_GPUS)
			continue;
		set->heard = number;
		if (!(set->registered & 1U << gpu))
			continue;
		*data = (struct event_data){
			.device = &gpus[gpu], .type = 8, .data = xid, .gpu_instance = -1, .compute_instance = -1
		};
		error = SUCCESS;
	}
	if (script)
		fclose(script);
	return error;
}

int nvmlDeviceGetMigMode(struct device *device, unsigned int *current, unsigned int *pending)
{
	u64 values[2];
	int error = ask_numbers(device, "nvmlDeviceGetMigMode", -1, values, 2);

	if (!error) {
		*current = values[0];
		*pending = values[1];
	}
	return error;
}

/* There is an instance where its UUID is in the script. */
int nvmlDeviceGetMigDeviceHandleByIndex(struct device *device, unsigned int index, struct device **instance)
{
	char rest[LINE];
	int error;

	if (!device || index >= MAX_INSTANCES)
		return INVALID_ARGUMENT;
	error = enter(device->name, "nvmlDeviceGetMigDeviceHandleByIndex", "nvmlDeviceGetMigDeviceHandleByIndex");
	if (error)
		return error;
	*instance = &instances[device - gpus][index];
	return find((*instance)->name, "nvmlDeviceGetUUID", rest) ? SUCCESS : NOT_FOUND;
}

/* The script has the slices of the GPU instance, those of the compute instance, and the memory in MiB. */
int nvmlDeviceGetAttributes_v2(struct device *device, struct attributes *attributes)
{
	u64 values[3];
	int error = ask_numbers(device, "nvmlDeviceGetAttributes_v2", -1, values, 3);

	if (!error)
		*attributes = (struct attributes){ .gpu_slices = values[0],
						   .compute_slices = values[1],
						   .memory_mb = values[2] };
	return error;
}

int nvmlGpmQueryDeviceSupport(struct device *device, struct gpm_support *support)
{
	if (support->version != 1)
		return ARGUMENT_VERSION_MISMATCH;
	return ask_number(device, "nvmlGpmQueryDeviceSupport", -1, &support->supported);
}

int nvmlGpmSampleAlloc(struct gpm_sample **sample)
{
	int error = enter("-", "nvmlGpmSampleAlloc", "nvmlGpmSampleAlloc");

	if (error)
		return error;
	*sample = calloc(1, sizeof(**sample));
	samples_out++;
	return SUCCESS;
}

int nvmlGpmSampleFree(struct gpm_sample *sample)
{
	samples_out--;
	free(sample);
	return enter("-", "nvmlGpmSampleFree", "nvmlGpmSampleFree");
}

static int take(const struct device *device, struct gpm_sample *sample)
{
	sample->taken = 1;
	sample->number = calls;
	snprintf(sample->device, sizeof(sample->device), "%s", device->name);
	return SUCCESS;
}

int nvmlGpmSampleGet(struct device *device, struct gpm_sample *sample)
{
	int error = enter(device->name, "nvmlGpmSampleGet", "nvmlGpmSampleGet");

	return error ? error : take(device, sample);
}

/* The script says of each MIG device which GPU instance it is in. */
int nvmlGpmMigSampleGet(struct device *device, unsigned int gpu_instance, struct gpm_sample *sample)
{
	char rest[LINE];
	int error = enter(device->name, "nvmlGpmMigSampleGet", "nvmlGpmMigSampleGet");

	if (error)
		return error;
	for (int i = 0; i < MAX_INSTANCES; i++) {
		const struct device *instance = &instances[device - gpus][i];

		if (find(instance->name, "nvmlDeviceGetGpuInstanceId", rest) && strtoul(rest, NULL, 0) == gpu_instance)
			return take(instance, sample);
	}
	return INVALID_ARGUMENT;
}

/* The script has `gpm:METRIC VALUE`, for the time between any two samples of the device. */
int nvmlGpmMetricsGet(struct gpm_metrics_get *get)
{
	int error = enter("-", "nvmlGpmMetricsGet", "nvmlGpmMetricsGet");

	if (error)
		return error;
	if (get->version != 1)
		return ARGUMENT_VERSION_MISMATCH;
	if (!get->older->taken || !get->newer->taken || get->older->number >= get->newer->number ||
	    strcmp(get->older->device, get->newer->device))
		return INVALID_ARGUMENT;
	for (unsigned int i = 0; i < get->count; i++) {
		char key[32], rest[LINE];

		snprintf(key, sizeof(key), "gpm:%u", get->metrics[i].id);
		get->metrics[i].result = NOT_SUPPORTED;
		if (find(get->newer->device, key, rest)) {
			get->metrics[i].result = SUCCESS;
			get->metrics[i].value = strtod(rest, NULL);
		}
	}
	return SUCCESS;
}
