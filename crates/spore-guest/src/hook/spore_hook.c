/* What spore_after_fork.js needs and JavaScript cannot do: ask the agent before the program's first
 * line runs, and have OpenSSL's generators draw from the kernel anew. It is built with the guest and
 * names no library: what it calls is in every process of Node.js already, and Node-API keeps its
 * binary form over all versions. */

#include <stddef.h>
#include <string.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#define AGENT "/run/spore/agent.sock"
#define QUESTION "{\"ask\":\"after_fork\"}\n"

typedef void *Env;
typedef void *Value;
typedef void *Call;

extern int napi_create_function(Env, const char *, size_t, Value (*)(Env, Call), void *, Value *);
extern int napi_create_int32(Env, int, Value *);
extern int napi_set_named_property(Env, Value, const char *, Value);
extern int napi_throw_error(Env, const char *, const char *);

/* Weak, so that a process that has no OpenSSL, or hides it, can be told from one that has. */
extern void RAND_add(const void *bytes, int count, double entropy) __attribute__((weak));

static Value fail(Env env, const char *message)
{
	napi_throw_error(env, "ERR_SPORE_HOOK", message);
	return NULL;
}

/* The connection on which the agent tells of forks. */
static Value ask(Env env, Call call)
{
	struct sockaddr_un agent = {.sun_family = AF_UNIX, .sun_path = AGENT};
	size_t length = sizeof QUESTION - 1;
	Value value;

	(void)call;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return fail(env, "no socket for " AGENT);
	if (connect(fd, (struct sockaddr *)&agent, sizeof agent) == 0 &&
	    send(fd, QUESTION, length, MSG_NOSIGNAL) == (ssize_t)length &&
	    napi_create_int32(env, fd, &value) == 0)
		return value;
	close(fd);
	return fail(env, "cannot ask the agent at " AGENT);
}

static Value reseed(Env env, Call call)
{
	unsigned char bytes[32];

	(void)call;
	/* The kernel has drawn anew before any process of a fork runs, so this cannot block. */
	if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes)
		return fail(env, "the kernel gave no random bytes");
	/* The generator that all threads' own descend from is seeded; they follow when they see it. */
	RAND_add(bytes, sizeof bytes, sizeof bytes);
	return NULL;
}

static int show(Env env, Value exports, const char *name, Value (*function)(Env, Call))
{
	Value value;

	return napi_create_function(env, name, strlen(name), function, NULL, &value) == 0 &&
	       napi_set_named_property(env, exports, name, value) == 0;
}

/* What Node.js calls when a thread loads the addon; the name is its own. */
Value napi_register_module_v1(Env env, Value exports)
{
	if (!RAND_add)
		return fail(env, "OpenSSL's RAND_add cannot be reached");
	if (!show(env, exports, "ask", ask) || !show(env, exports, "reseed", reseed))
		return fail(env, "cannot show its functions");
	return exports;
}
