// SPDX-License-Identifier: Apache-2.0
/* Visits the places of libplaces.so as often as each line on stdin says: FIRST SECOND, or `open PATH`, or `fork`. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

int main(void)
{
	int (*first)(int) = NULL, (*second)(int) = NULL;
	char line[4096], path[4000];
	int one, two, seen;
	void *library;

	setvbuf(stdin, NULL, _IONBF, 0);
	printf("%d\n", getpid());
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		seen = 0;
		if (sscanf(line, "open %3999s", path) == 1) {
			library = dlopen(path, RTLD_NOW);
			if (!library) {
				printf("%s\n", dlerror());
				return 1;
			}
			first = (int (*)(int))dlsym(library, "places_first");
			second = (int (*)(int))dlsym(library, "places_second");
		} else if (!strncmp(line, "fork", 4)) {
			if (fork())
				wait(NULL);
			else
				seen = getpid();
		} else if (sscanf(line, "%d %d", &one, &two) == 2) {
			while (one-- > 0)
				first(1);
			while (two-- > 0)
				seen = second(1);
		} else {
			return 0;
		}
		printf("%d\n", seen);
		fflush(stdout);
	}
	return 0;
}
