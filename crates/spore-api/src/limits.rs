//! Every public limit, by name. An answer that refuses names the limit.

/// vCPUs of a VM.
pub const CPUS_MAX: u8 = 4;
/// The least memory of a VM, in MiB: a Debian kernel and the agent need it.
pub const MEMORY_MIB_MIN: u32 = 64;
/// The most memory of a VM, in MiB.
pub const MEMORY_MIB_MAX: u32 = 32 * 1024;
/// The memory of a VM when nobody says, in MiB.
pub const MEMORY_MIB_DEFAULT: u32 = 256;
/// The least scratch disk, in MiB.
pub const DISK_MIB_MIN: u32 = 16;
/// The most scratch disk, in MiB.
pub const DISK_MIB_MAX: u32 = 64 * 1024;
/// The scratch disk when nobody says, in MiB.
pub const DISK_MIB_DEFAULT: u32 = 1024;
/// The longest idle time before an app is put to sleep, in seconds (a day).
pub const IDLE_S_MAX: u64 = 24 * 60 * 60;
/// The shortest, in seconds.
pub const IDLE_S_MIN: u64 = 1;
/// The longest time an app may take to become ready, in seconds.
pub const READY_S_MAX: u64 = 600;
/// The most bytes of an uploaded folder, compressed.
pub const SOURCE_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// The most bytes of an uploaded folder, unpacked.
pub const SOURCE_UNPACKED_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// The most files, folders and links in an uploaded folder.
pub const SOURCE_ENTRIES_MAX: u64 = 200_000;
/// The most arguments of a command.
pub const COMMAND_PARTS_MAX: usize = 256;
/// The most bytes of one argument.
pub const COMMAND_PART_BYTES_MAX: usize = 32 * 1024;
/// The most bytes of one secret value.
pub const SECRET_BYTES_MAX: usize = 64 * 1024;
/// The most secrets of one app.
pub const SECRETS_PER_APP_MAX: usize = 128;
/// The most bytes of all secret values of one app together: a VM is told them in one message, even
/// when a release wants each in the environment and as a file.
pub const SECRETS_BYTES_PER_APP_MAX: usize = 256 * 1024;
/// The most bytes of a release's command and environment together, as JSON: they are in the same
/// message.
pub const COMMAND_BYTES_MAX: usize = 256 * 1024;
/// The most grants of one app.
pub const EGRESS_GRANTS_MAX: usize = 64;
/// The most apps of one account.
pub const APPS_PER_ACCOUNT_MAX: usize = 10_000;
/// Releases kept for rollback; older ones are forgotten.
pub const RELEASES_KEPT: usize = 20;
/// The most items of one page of a list.
pub const PAGE_ITEMS_MAX: u32 = 500;
/// The items of one page when nobody says.
pub const PAGE_ITEMS_DEFAULT: u32 = 100;
/// The most bytes of a JSON body.
pub const JSON_BYTES_MAX: usize = 1024 * 1024;
/// The most bytes of an `Idempotency-Key`.
pub const IDEMPOTENCY_KEY_BYTES_MAX: usize = 128;
/// How long an idempotency key is remembered, in seconds (a day).
pub const IDEMPOTENCY_S: u64 = 24 * 60 * 60;
/// The most sandboxes of one fork.
pub const FORKS_MAX: u32 = 1000;
/// The most forks of one account that are under way at once.
pub const FORKS_AT_ONCE_MAX: u32 = 4;
/// The most sandboxes of one account.
pub const SANDBOXES_PER_ACCOUNT_MAX: u64 = 2000;
/// The most tags of one account.
pub const TAGS_PER_ACCOUNT_MAX: u64 = 1000;
