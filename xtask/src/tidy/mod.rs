//! x
pub(crate) fn run(_d: bool) -> anyhow::Result<()> {
    Ok(())
}
