//! Compile-time pins of every number that is frozen inside snapshots or running processes.
//!
//! A failing line here means: an agent, gateway or proxy that is already running would be
//! misunderstood. Change `generation.rs` first, then say here which generations have which number.

use crate::{egress, frame, gateway, generation, guest, launch, vmm, zygote};

const _: () = assert!(frame::HEADER_BYTES == 16);
const _: () = assert!(frame::FRAME_BYTES_MAX == 64 * 1024);
const _: () = assert!(frame::MESSAGE_BYTES_MAX == 1024 * 1024);
const _: () = assert!(matches!(
    frame::SYNC_MARK,
    [0xa5, b'S', b'P', b'O', b'R', b'E', 0, 0xa5]
));
const _: () = assert!(guest::CREDIT_BYTES == 256 * 1024);
const _: () = assert!(matches!(guest::GUEST_ADDRESS, [10, 42, 0, 2]));
const _: () = assert!(matches!(guest::HOST_ADDRESS, [10, 42, 0, 1]));
const _: () = assert!(guest::ADDRESS_PREFIX == 30);
const _: () = assert!(gateway::PACKET_BYTES_MAX == 64 * 1024);
const _: () = assert!(egress::PROXY_PORT == 3128);
const _: () = assert!(egress::TCP_FD == 3);
const _: () = assert!(egress::DNS_FD == 4);
const _: () = assert!(generation::GENERATION_FORKS == 2);
const _: () = assert!(generation::GENERATION_VMMS == 2);
const _: () = assert!(vmm::PACKET_BYTES_MAX == 64 * 1024);
const _: () = assert!(launch::FDS_MAX == 64);
const _: () = assert!(launch::LAYERS_MAX == 32);
const _: () = assert!(launch::AHEAD_MAX == 2048);
const _: () = assert!(launch::LAYER_KEY_BYTES == 64);
const _: () = assert!(launch::TAP_HEADER_BYTES == 10);
const _: () = assert!(zygote::PACKET_BYTES_MAX == 4096);
const _: () = assert!(zygote::FDS_MAX == 8);
const _: () = assert!(zygote::SOCKET_FD == 3);
const _: () = assert!(zygote::KVM_FD == 4);
