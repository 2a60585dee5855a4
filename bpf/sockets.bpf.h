/* SPDX-License-Identifier: GPL-2.0-only OR BSD-2-Clause */
/*
 * What more than one probe asks of a socket.
 */
#ifndef FOOTLIGHT_SOCKETS_BPF_H
#define FOOTLIGHT_SOCKETS_BPF_H

#include "kernel.h"

/*
 * Whether a send has just met a full buffer. One that moved some of its bytes does not say so; then the kernel has set
 * SOCK_NOSPACE, and the buffer is full. The bit alone would not do: poll sets it from two thirds on. A blocking socket has
 * waited inside the call, and may have left the bit behind.
 */
static __always_inline bool no_room(const struct sock *sk, int result)
{
	if (result == -EAGAIN)
		return true;
	return result > 0 && sk->sk_wmem_queued >= sk->sk_sndbuf && sk->sk_socket->flags & (1 << SOCK_NOSPACE) &&
	       sk->sk_socket->file->f_flags & O_NONBLOCK;
}

#endif
